// symmetrize_edges_backward on the GPU: the gradient in the weights of the directed edges, one thread an edge, which
// finds its two entries by bisection. Weights are first written to the entries, so that an edge finds the one that runs
// back. The same bits as `symmetrize_edges_backward_reference`. rowptr and col are those that symmetrize_edges made; a
// list names no node twice, so that no two threads write to one entry.
#include <torch/csrc/stable/library.h>

#include <string>
#include <type_traits>

#include "graphs/graphs.h"
#include "graphs/lists.cuh"
#include "graphs/threads.cuh"

namespace lfm {
namespace {

using namespace graphs;

struct Csr {
  const int64_t* rowptr;
  const int32_t* col;
  // Position of (row, column), or -1.
  __device__ int64_t find(int64_t row, int64_t column) const {
    int64_t low = rowptr[row], high = rowptr[row + 1];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (col[middle] < column) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < rowptr[row + 1] && col[low] == column ? low : -1;
  }
};

// directed[position of (i, j)] = weight of the edge i -> j; the others keep NaN: no such edge.
template <class T>
__global__ void __launch_bounds__(kThreads) direct_kernel(Edges edges, const T* weights, Csr csr, T* directed) {
  const int64_t e = thread_index();
  if (e >= edges.count || !edges.valid(e)) return;
  const int64_t from = edges.from(e), at = csr.find(from, edges.first(from) + edges.indices[e]);
  if (at >= 0) directed[at] = weights[e];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Edges edges, const T* weights, Csr csr, const T* directed, const T* grad, Mode mode, T* out) {
  const int64_t e = thread_index();
  if (e >= edges.count) return;
  T both = 0, share = T(0.5);
  if (edges.valid(e)) {
    const int64_t from = edges.from(e), to = edges.first(from) + edges.indices[e];
    const int64_t there = csr.find(from, to), back = csr.find(to, from);
    both = (there >= 0 ? grad[there] : T(0)) + (back >= 0 ? grad[back] : T(0));
    if (mode != Mode::mean) {
      const T own = weights[e], other = back >= 0 ? directed[back] : static_cast<T>(NAN);
      if (isnan(other)) {
        share = mode == Mode::union_ ? T(1) : T(0);
      } else if (own != other) {
        share = (mode == Mode::union_ ? own > other : own < other) ? T(1) : T(0);
      }
    }
  }
  out[e] = share * both;
}

template <class T>
void symmetrize_backward(const Edges& edges, const Tensor& weights, const Csr& csr, const Tensor& grad, Mode mode,
                         T* out, cudaStream_t stream) {
  const int64_t nnz = grad.size(0);
  const Buffer<T> directed(grad, mode == Mode::mean ? 0 : nnz);
  if (mode != Mode::mean && nnz > 0) {
    // all bits set is a NaN
    STD_CUDA_CHECK(cudaMemsetAsync(directed.get(), 0xFF, nnz * sizeof(T), stream));
    direct_kernel<T>
        <<<grid_for(edges.count), kThreads, 0, stream>>>(edges, weights.const_data_ptr<T>(), csr, directed.get());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  backward_kernel<T><<<grid_for(edges.count), kThreads, 0, stream>>>(
      edges, weights.const_data_ptr<T>(), csr, directed.get(), grad.const_data_ptr<T>(), mode, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor symmetrize_edges_backward_cuda(Tensor indices, Tensor weights, Tensor rowptr, Tensor col, Tensor grad,
                                      std::string mode) {
  check_lists(indices, weights);
  check_csr(rowptr, col);
  check_same_device("rowptr", rowptr, "indices", indices);
  check_same_device("col", col, "indices", indices);
  check_size("rowptr", rowptr, 0, indices.size(0) * indices.size(1) + 1);
  check_same_device("grad", grad, "indices", indices);
  check_like("grad", grad, "weights", weights);
  check_dim("grad", grad, 1);
  check_size("grad", grad, 0, col.size(0));
  check_contiguous("grad", grad);
  const Mode how = mode_of(mode);
  const DeviceScope scope(indices);
  Tensor out = torch::stable::new_empty(weights, weights.sizes());
  const Edges edges{indices.const_data_ptr<int64_t>(), indices.size(1), indices.size(2), indices.numel()};
  if (edges.count == 0) return out;
  const Csr csr{rowptr.const_data_ptr<int64_t>(), col.const_data_ptr<int32_t>()};
  dispatch_floating("weights", weights, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    symmetrize_backward<T>(edges, weights, csr, grad, how, out.mutable_data_ptr<T>(), scope.stream());
  });
  return out;
}

}  // namespace
}  // namespace lfm

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) {
  m.impl("symmetrize_edges_backward", TORCH_BOX(&lfm::symmetrize_edges_backward_cuda));
}
