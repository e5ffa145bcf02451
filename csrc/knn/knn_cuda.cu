// knn and knn_ragged on the GPU, exact k nearest neighbours: the operators, which check, allocate, and search
// (search.cuh). The values of `knn_reference` and `knn_ragged_reference` to within the rounding of float64 sums,
// rounded once, and in the order (rounded value, index): another order than theirs only where that rounding decides.
// Point sets have fewer than 2^31 - 128 points, so that a position in whole panels fits 32 bits; offsets have 64.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "knn/knn.h"
#include "knn/search.cuh"

namespace lfm {
namespace {

using namespace knn;

std::tuple<Tensor, Tensor> knn_cuda(Tensor x, std::optional<Tensor> y, int64_t n_neighbors, std::string metric,
                                    int64_t memory_budget) {
  check_cuda("x", x);
  check_dim("x", x, 3);
  check_floating("x", x);
  check_contiguous("x", x);
  if (y) {
    check_same_device("y", *y, "x", x);
    check_like("y", *y, "x", x);
    check_dim("y", *y, 3);
    check_size("y", *y, 0, x.size(0));
    check_size("y", *y, 2, x.size(2));
    check_contiguous("y", *y);
  }
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), m = y ? y->size(1) : n, most = y ? m : n - 1;
  LFM_CHECK(n_neighbors >= 1 && n_neighbors <= most, "n_neighbors must be between 1 and ", most, ", got ", n_neighbors);
  LFM_CHECK(n <= INT32_MAX - kTile && m <= INT32_MAX - kTile, "a point set must have at most ", INT32_MAX - kTile,
            " points, got ", std::max(n, m));
  LFM_CHECK(n_neighbors <= 1 << 27, "n_neighbors must be at most 2^27, got ", n_neighbors);
  LFM_CHECK(d >= 1 && d <= 1 << 20, "x must have between 1 and 2^20 features, got ", d);
  const Problem p = describe(n, m, d, n_neighbors, !y.has_value(), metric_of(metric));
  const int64_t workspace = memory_budget > 0 ? std::min(memory_budget, kWorkspaceBytes) : kWorkspaceBytes;
  const DeviceScope scope(x);
  Tensor indices = torch::stable::new_empty(x, {batch, n, n_neighbors}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(x, {batch, n, n_neighbors});
  if (batch == 0 || n == 0) return {indices, distances};
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *rows = x.const_data_ptr<T>(), *columns = y ? y->const_data_ptr<T>() : nullptr;
    int64_t* found = indices.mutable_data_ptr<int64_t>();
    T* values = distances.mutable_data_ptr<T>();
    if (p.metric == Metric::cosine || p.metric == Metric::angular) {
      const Buffer<double> unit_rows(x, batch * n * d), unit_columns(x, y ? batch * m * d : 0);
      make_unit<T>(rows, unit_rows.get(), batch * n, d, scope.stream());
      if (y) make_unit<T>(columns, unit_columns.get(), batch * m, d, scope.stream());
      search<T, double, false>(p, x, unit_rows.get(), unit_columns.get(), batch, found, values, workspace,
                               scope.stream());
    } else if (p.metric == Metric::euclidean) {
      search<T, T, false>(p, x, rows, columns, batch, found, values, workspace, scope.stream());
    } else {
      search<T, T, true>(p, x, rows, columns, batch, found, values, workspace, scope.stream());
    }
  });
  return {indices, distances};
}

// Results of one set of a ragged batch, k of them in each row, to rows of `stride`; the rest of a row is empty.
template <class T>
__global__ void __launch_bounds__(kThreads)
    place_kernel(const int64_t* indices, const T* distances, int64_t rows, int64_t k, int64_t stride, int64_t first,
                 T none, int64_t* out_indices, T* out_distances) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = at / stride, c = at % stride;
  if (row >= rows) return;
  out_indices[at] = c < k ? first + indices[row * k + c] : -1;
  out_distances[at] = c < k ? distances[row * k + c] : none;
}

// The offsets are in host memory: the sets are launched one after the other, without waiting for the device.
std::tuple<Tensor, Tensor> knn_ragged_cuda(Tensor x, std::optional<Tensor> y, Tensor offsets,
                                           std::optional<Tensor> y_offsets, int64_t n_neighbors, std::string metric,
                                           int64_t memory_budget) {
  check_cuda("x", x);
  check_dim("x", x, 2);
  check_floating("x", x);
  check_contiguous("x", x);
  check_offsets("offsets", offsets, x.size(0));
  LFM_CHECK(y.has_value() == y_offsets.has_value(), "y_offsets must be given with y, and only then");
  if (y) {
    check_dim("y", *y, 2);
    check_contiguous("y", *y);
    check_offsets("y_offsets", *y_offsets, y->size(0));
    check_size("y_offsets", *y_offsets, 0, offsets.size(0));
  }
  LFM_CHECK(n_neighbors >= 1, "n_neighbors must be at least 1, got ", n_neighbors);
  const bool product = metric_of(metric) == Metric::inner_product;
  const int64_t* start = offsets.const_data_ptr<int64_t>();
  const int64_t* y_start = y ? y_offsets->const_data_ptr<int64_t>() : start;
  const DeviceScope scope(x);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), n_neighbors}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(x, {x.size(0), n_neighbors});
  const auto part_of = [](Tensor points, int64_t first, int64_t count) {
    return torch::stable::view(torch::stable::narrow(points, 0, first, count), {1, count, points.size(1)});
  };
  for (int64_t s = 0; s + 1 < offsets.size(0); ++s) {
    const int64_t first = start[s], n = start[s + 1] - first, y_first = y_start[s], m = y_start[s + 1] - y_first;
    if (n == 0) continue;
    const int64_t k = std::max<int64_t>(0, std::min(n_neighbors, y ? m : n - 1));
    std::optional<std::tuple<Tensor, Tensor>> found;
    if (k > 0) {
      std::optional<Tensor> database;
      if (y) database = part_of(*y, y_first, m);
      found = knn_cuda(part_of(x, first, n), database, k, metric, memory_budget);
    }
    dispatch_floating("x", x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T none = product ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();
      place_kernel<T><<<grid_of(ceil_div(n * n_neighbors, kThreads)), kThreads, 0, scope.stream()>>>(
          found ? std::get<0>(*found).const_data_ptr<int64_t>() : nullptr,
          found ? std::get<1>(*found).const_data_ptr<T>() : nullptr, n, k, n_neighbors, y_first, none,
          indices.mutable_data_ptr<int64_t>() + first * n_neighbors,
          distances.mutable_data_ptr<T>() + first * n_neighbors);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return {indices, distances};
}

}  // namespace
}  // namespace lfm

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) {
  m.impl("knn", TORCH_BOX(&lfm::knn_cuda));
  m.impl("knn_ragged", TORCH_BOX(&lfm::knn_ragged_cuda));
}
