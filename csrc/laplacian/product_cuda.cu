// laplacian_product on the GPU: one warp per row and block of columns, its lanes shared out over edges and columns.
// Within rounding of `laplacian_product_reference`. Half types are storage only: values are computed in float32 and
// rounded once, where the result is written. Sums have a fixed order, so results do not change from run to run. A warp
// writes its own entries; nodes fit 32 bits, offsets have 64. The CSR is valid.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <type_traits>

#include "laplacian/blocks.cuh"
#include "laplacian/laplacian.h"

namespace lfm {
namespace {

using namespace laplacian;

__device__ inline float value_of(float stored) { return stored; }
__device__ inline double value_of(double stored) { return stored; }
__device__ inline float value_of(__half stored) { return __half2float(stored); }
__device__ inline float value_of(__nv_bfloat16 stored) { return __bfloat162float(stored); }

// To the nearest stored value, ties to even.
__device__ inline void store(float value, float& into) { into = value; }
__device__ inline void store(double value, double& into) { into = value; }
__device__ inline void store(float value, __half& into) { into = __float2half_rn(value); }
__device__ inline void store(float value, __nv_bfloat16& into) { into = __float2bfloat16_rn(value); }

// S: how the block is stored; T: what is computed in.
template <class S, class T>
struct Product {
  const int64_t* rowptr;
  const int32_t* col;
  const T *weight, *diagonal, *left, *right;
  const S *x, *z;  // z may be null
  S* y;
  int64_t rows, columns, blocks;  // blocks: of kLanes x kVector columns
  T a, b, c;
};

// y = (a diagonal + b) x - a left sum_e weight_e right_j x_j + c z. A warp takes one row and one block of columns;
// kLanes lanes go across the columns, so that 32 / kLanes edges are added at once.
template <class S, class T, int kVector, int kLanes>
__global__ void __launch_bounds__(kThreads) product_kernel(Product<S, T> p) {
  constexpr int kEdges = kWarp / kLanes, kInFlight = kLanes < 8 ? kLanes : 8;
  const int lane = threadIdx.x % kWarp, across = lane % kLanes, edge = lane / kLanes;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (task >= p.rows * p.blocks) return;
  const int64_t row = task / p.blocks, column = (task % p.blocks * kLanes + across) * kVector;
  const bool active = column < p.columns;
  const S* x = p.x + (active ? column : 0);  // lanes past the last column read along, and drop what they read
  const int64_t end = p.rowptr[row + 1];
  T sum[kVector] = {};
  for (int64_t first = p.rowptr[row]; first < end; first += kWarp) {
    // the warp reads 32 edges at once and hands them round; past the end it reads the row itself, and adds nothing
    int32_t own_node = static_cast<int32_t>(row);
    T own_weight = 0;
    if (first + lane < end) {
      own_node = p.col[first + lane];
      own_weight = p.weight[first + lane] * p.right[own_node];
    }
    const int count = static_cast<int>(min(end - first, int64_t{kWarp}));
    for (int base = 0; base < count; base += kInFlight * kEdges) {
      Pack<S, kVector> values[kInFlight];
      T weights[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int64_t node = __shfl_sync(kFullWarp, own_node, base + u * kEdges + edge);
        weights[u] = __shfl_sync(kFullWarp, own_weight, base + u * kEdges + edge);
        values[u] = load<kVector>(x + node * p.columns);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (base + u * kEdges + edge >= count) continue;
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum[v] += weights[u] * value_of(values[u].v[v]);
      }
    }
  }
#pragma unroll
  for (int offset = kLanes; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[v] += __shfl_xor_sync(kFullWarp, sum[v], offset);
  }
  if (!active || edge != 0) return;
  const T own = p.a * p.diagonal[row] + p.b, other = -p.a * p.left[row];
  const int64_t at = row * p.columns + column;
  const Pack<S, kVector> before = load<kVector>(p.x + at);
#pragma unroll
  for (int v = 0; v < kVector; ++v) sum[v] = own * value_of(before.v[v]) + other * sum[v];
  if (p.z) {
    const Pack<S, kVector> z = load<kVector>(p.z + at);
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[v] += p.c * value_of(z.v[v]);
  }
  Pack<S, kVector> y;
#pragma unroll
  for (int v = 0; v < kVector; ++v) store(sum[v], y.v[v]);
  *reinterpret_cast<Pack<S, kVector>*>(p.y + at) = y;
}

template <int kVector, class S, class T>
void launch(Product<S, T> p, cudaStream_t stream) {
  with_lanes(ceil_div(p.columns, kVector), [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    p.blocks = ceil_div(p.columns, kLanes * kVector);
    product_kernel<S, T, kVector, kLanes><<<grid_of(ceil_div(p.rows * p.blocks, kWarps)), kThreads, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// Calls body with null pointers of the type a block is stored in and of the type it is computed in.
template <class Body>
void dispatch_stored(const Tensor& x, Body&& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr), static_cast<float*>(nullptr));
    default:
      return body(static_cast<__half*>(nullptr), static_cast<float*>(nullptr));
  }
}

}  // namespace

Tensor laplacian_product_cuda(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                              Tensor x, std::optional<Tensor> z, double a, double b, double c) {
  const int64_t rows = check_graph(rowptr, col, x);
  check_block("x", x, x, rows);
  check_same_device("weight", weight, "x", x);
  check_block_type("x", x, "weight", weight);
  check_scaling("weight", weight, "weight", weight, col.size(0));
  check_scaling("diagonal", diagonal, "weight", weight, rows);
  check_scaling("left", left, "weight", weight, rows);
  check_scaling("right", right, "weight", weight, rows);
  if (z) check_block("z", *z, x, rows);
  const DeviceScope scope(x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (rows == 0 || x.size(1) == 0) return y;
  dispatch_stored(x, [&](auto* stored, auto* value) {
    using S = std::remove_pointer_t<decltype(stored)>;
    using T = std::remove_pointer_t<decltype(value)>;
    Product<S, T> p{};
    p.rowptr = rowptr.const_data_ptr<int64_t>();
    p.col = col.const_data_ptr<int32_t>();
    p.weight = weight.const_data_ptr<T>();
    p.diagonal = diagonal.const_data_ptr<T>();
    p.left = left.const_data_ptr<T>();
    p.right = right.const_data_ptr<T>();
    p.x = static_cast<const S*>(x.const_data_ptr());
    p.z = z ? static_cast<const S*>(z->const_data_ptr()) : nullptr;
    p.y = static_cast<S*>(y.mutable_data_ptr());
    p.rows = rows;
    p.columns = x.size(1);
    p.a = static_cast<T>(a);
    p.b = static_cast<T>(b);
    p.c = static_cast<T>(c);
    if (vectorizable<S>(p.columns, {p.x, p.y, p.z})) {
      launch<16 / sizeof(S)>(p, scope.stream());
    } else {
      launch<1>(p, scope.stream());
    }
  });
  return y;
}

}  // namespace lfm

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) { m.impl("laplacian_product", TORCH_BOX(&lfm::laplacian_product_cuda)); }
