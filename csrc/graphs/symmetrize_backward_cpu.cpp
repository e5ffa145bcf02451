// symmetrize_edges_backward: the gradient of symmetrize_edges in the weights of the directed edges. Each edge finds its
// two entries by bisection, and the edge that runs back in the list of its end.
// The same bits as `symmetrize_edges_backward_reference`. Indices are checked (lists.h); rowptr and col are those that
// symmetrize_edges made, ascending in each row. Every edge is written once, by the task of its row.
#include <algorithm>
#include <type_traits>

#include "checks.h"
#include "graphs/graphs.h"
#include "graphs/lists.h"
#include "parallel.h"

namespace lfm {
namespace {

constexpr int64_t kRowsPerTask = 256;

template <class T>
void symmetrize_backward(const Tensor& indices, const Tensor& weights, const Tensor& rowptr, const Tensor& col,
                         const Tensor& grad, Mode mode, T* out) {
  const int64_t n = indices.size(1), k = indices.size(2), rows = indices.size(0) * n;
  const int64_t *index = indices.const_data_ptr<int64_t>(), *pointer = rowptr.const_data_ptr<int64_t>();
  const int32_t* columns = col.const_data_ptr<int32_t>();
  const T *weight = weights.const_data_ptr<T>(), *g = grad.const_data_ptr<T>();
  const auto grad_at = [&](int64_t i, int64_t j) {
    const int32_t *end = columns + pointer[i + 1], *at = std::lower_bound(columns + pointer[i], end, j);
    return at != end && *at == j ? g[at - columns] : T(0);
  };
  parallel_tasks((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) {
      const int64_t base = i / n * n;
      for (int64_t e = i * k; e < (i + 1) * k; ++e) {
        const int64_t j = base + index[e];
        const T both = grad_at(i, j) + grad_at(j, i);
        if (mode == Mode::mean) {
          out[e] = both / 2;
          continue;
        }
        const int64_t *list = index + j * k, *reverse = std::find(list, list + k, i - base);
        T share = mode == Mode::union_ ? T(1) : T(0);
        if (reverse != list + k) {
          const T other = weight[reverse - index];
          const bool better = mode == Mode::union_ ? weight[e] > other : weight[e] < other;
          share = weight[e] == other ? T(0.5) : T(better);
        }
        out[e] = share * both;
      }
    }
  });
}

}  // namespace

Tensor symmetrize_edges_backward_cpu(Tensor indices, Tensor weights, Tensor rowptr, Tensor col, Tensor grad,
                                     std::string mode) {
  check_lists(indices, weights);
  check_indices_in_range(indices);
  check_csr(rowptr, col);
  check_size("rowptr", rowptr, 0, indices.size(0) * indices.size(1) + 1);
  check_like("grad", grad, "weights", weights);
  check_dim("grad", grad, 1);
  check_size("grad", grad, 0, col.size(0));
  check_contiguous("grad", grad);
  const Mode how = mode_of(mode);
  Tensor out = torch::stable::new_empty(weights, weights.sizes());
  dispatch_floating("weights", weights, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    symmetrize_backward<T>(indices, weights, rowptr, col, grad, how, out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace lfm
