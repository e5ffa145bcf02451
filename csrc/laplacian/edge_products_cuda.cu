// edge_products on the GPU: left_i right_j <g_i, x_j> for every edge, the gradient of laplacian_product in the weights.
// One warp per row, a few lanes to an edge.
// Within rounding of `edge_products_reference`; sums have a fixed order. A warp writes the edges of its own row; nodes
// fit 32 bits, offsets have 64. The CSR is valid.
#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "laplacian/blocks.cuh"
#include "laplacian/laplacian.h"

namespace lfm {
namespace {

using namespace laplacian;

template <class T>
struct EdgeProducts {
  const int64_t* rowptr;
  const int32_t* col;
  const T *left, *right, *g, *x;
  T* out;
  int64_t rows, columns;
};

// left_i right_j <g_i, x_j>: a warp takes the edges of a row, 32 / kLanes at a time, kLanes lanes to an edge.
template <class T, int kVector, int kLanes>
__global__ void __launch_bounds__(kThreads) edge_kernel(EdgeProducts<T> p) {
  constexpr int kEdges = kWarp / kLanes;
  const int lane = threadIdx.x % kWarp, across = lane % kLanes, edge = lane / kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int64_t end = p.rowptr[row + 1];
  const T* g = p.g + row * p.columns;
  for (int64_t first = p.rowptr[row]; first < end; first += kEdges) {
    const int64_t e = first + edge;
    const int64_t node = e < end ? p.col[e] : 0;
    T dot = 0;
    if (e < end) {
      const T* x = p.x + node * p.columns;
      for (int64_t c = across * kVector; c < p.columns; c += kLanes * kVector) {
        const Pack<T, kVector> a = load<kVector>(g + c), b = load<kVector>(x + c);
#pragma unroll
        for (int v = 0; v < kVector; ++v) dot += a.v[v] * b.v[v];
      }
    }
    dot = lanes_sum<kLanes>(dot);
    if (e < end && across == 0) p.out[e] = p.left[row] * p.right[node] * dot;
  }
}

template <int kVector, class T>
void launch(const EdgeProducts<T>& p, cudaStream_t stream) {
  // two loads to a lane: half the shuffles of the reduction
  with_lanes(ceil_div(p.columns, 2 * kVector), [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    edge_kernel<T, kVector, kLanes><<<grid_of(ceil_div(p.rows, kWarps)), kThreads, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensor edge_products_cuda(Tensor rowptr, Tensor col, Tensor left, Tensor right, Tensor g, Tensor x) {
  const int64_t rows = check_graph(rowptr, col, x);
  check_floating("x", x);
  check_block("x", x, x, rows);
  check_block("g", g, x, rows);
  check_scaling("left", left, "x", x, rows);
  check_scaling("right", right, "x", x, rows);
  const DeviceScope scope(x);
  Tensor out = torch::stable::new_empty(x, {col.size(0)});
  if (rows == 0 || col.size(0) == 0) return out;
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const EdgeProducts<T> p{rowptr.const_data_ptr<int64_t>(),
                            col.const_data_ptr<int32_t>(),
                            left.const_data_ptr<T>(),
                            right.const_data_ptr<T>(),
                            g.const_data_ptr<T>(),
                            x.const_data_ptr<T>(),
                            out.mutable_data_ptr<T>(),
                            rows,
                            x.size(1)};
    if (vectorizable<T>(p.columns, {p.g, p.x})) {
      launch<16 / sizeof(T)>(p, scope.stream());
    } else {
      launch<1>(p, scope.stream());
    }
  });
  return out;
}

}  // namespace
}  // namespace lfm

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) { m.impl("edge_products", TORCH_BOX(&lfm::edge_products_cuda)); }
