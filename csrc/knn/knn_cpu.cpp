// knn and knn_ragged, exact k nearest neighbours: the operators on the CPU, which check, allocate, and search each
// point set (search.h).
// The values of `knn_reference` and `knn_ragged_reference` to within the rounding of float64 sums, rounded once, and in
// the order (rounded value, index): another order than theirs only where that rounding decides. The same for any number
// of threads. Points fit 32 bits, offsets have 64.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "knn/knn.h"
#include "knn/problem.h"
#include "knn/search.h"
#include "memory.h"

namespace lfm {
namespace {

using namespace knn;

void check_database(const Tensor& x, const std::optional<Tensor>& y, int64_t dim) {
  check_dim("x", x, dim);
  check_floating("x", x);
  check_contiguous("x", x);
  if (!y) return;
  check_like("y", *y, "x", x);
  check_dim("y", *y, dim);
  if (dim == 3) check_size("y", *y, 0, x.size(0));
  check_size("y", *y, dim - 1, x.size(dim - 1));
  check_contiguous("y", *y);
}

}  // namespace

std::tuple<Tensor, Tensor> knn_cpu(Tensor x, std::optional<Tensor> y, int64_t n_neighbors, std::string metric,
                                   int64_t memory_budget) {
  check_database(x, y, 3);
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), m = y ? y->size(1) : n;
  const int64_t most = y ? m : n - 1;
  LFM_CHECK(n_neighbors >= 1 && n_neighbors <= most, "n_neighbors must be between 1 and ", most, ", got ", n_neighbors);
  LFM_CHECK(n <= INT32_MAX && m <= INT32_MAX, "a point set must have at most 2^31 - 1 points, got ", std::max(n, m));
  const Metric how = metric_of(metric);
  Tensor indices = torch::stable::new_empty(x, {batch, n, n_neighbors}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(x, {batch, n, n_neighbors});
  if (batch == 0 || n == 0) return {indices, distances};
  prefer_large_pages(indices.mutable_data_ptr<int64_t>(), indices.numel());
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* queries = x.const_data_ptr<T>();
    const T* database = y ? y->const_data_ptr<T>() : queries;
    prefer_large_pages(distances.mutable_data_ptr<T>(), distances.numel());
    std::vector<Problem<T>> sets(batch);
    for (int64_t b = 0; b < batch; ++b) {
      sets[b] = {queries + b * n * d,
                 database + b * m * d,
                 n,
                 m,
                 d,
                 n_neighbors,
                 how,
                 !y.has_value(),
                 indices.mutable_data_ptr<int64_t>() + b * n * n_neighbors,
                 distances.mutable_data_ptr<T>() + b * n * n_neighbors,
                 n_neighbors,
                 0};
    }
    search(sets, memory_budget);
  });
  return {indices, distances};
}

std::tuple<Tensor, Tensor> knn_ragged_cpu(Tensor x, std::optional<Tensor> y, Tensor offsets,
                                          std::optional<Tensor> y_offsets, int64_t n_neighbors, std::string metric,
                                          int64_t memory_budget) {
  check_database(x, y, 2);
  check_offsets("offsets", offsets, x.size(0));
  LFM_CHECK(y.has_value() == y_offsets.has_value(), "y_offsets must be given with y, and only then");
  if (y) {
    check_offsets("y_offsets", *y_offsets, y->size(0));
    check_size("y_offsets", *y_offsets, 0, offsets.size(0));
  }
  LFM_CHECK(n_neighbors >= 1, "n_neighbors must be at least 1, got ", n_neighbors);
  LFM_CHECK(x.size(0) <= INT32_MAX && (!y || y->size(0) <= INT32_MAX), "there must be at most 2^31 - 1 points");
  const Metric how = metric_of(metric);
  const int64_t d = x.size(1), *start = offsets.const_data_ptr<int64_t>();
  const int64_t* y_start = y ? y_offsets->const_data_ptr<int64_t>() : start;
  Tensor indices = torch::stable::new_empty(x, {x.size(0), n_neighbors}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(x, {x.size(0), n_neighbors});
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* queries = x.const_data_ptr<T>();
    const T* database = y ? y->const_data_ptr<T>() : queries;
    int64_t* found = indices.mutable_data_ptr<int64_t>();
    T* values = distances.mutable_data_ptr<T>();
    std::fill(found, found + indices.numel(), -1);
    const T none = std::numeric_limits<T>::infinity();
    std::fill(values, values + distances.numel(), how == Metric::inner_product ? -none : none);
    std::vector<Problem<T>> sets;
    for (int64_t s = 0; s + 1 < offsets.size(0); ++s) {
      const int64_t first = start[s], n = start[s + 1] - first, y_first = y_start[s], m = y_start[s + 1] - y_first;
      const int64_t k = std::min(n_neighbors, y ? m : n - 1);
      if (n == 0 || k <= 0) continue;
      sets.push_back({queries + first * d, database + y_first * d, n, m, d, k, how, !y.has_value(),
                      found + first * n_neighbors, values + first * n_neighbors, n_neighbors, y_first});
    }
    search(sets, memory_budget);
  });
  return {indices, distances};
}

}  // namespace lfm
