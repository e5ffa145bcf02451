// laplacian_product and its edge gradient on the GPU: one warp per row, its lanes shared out over edges and columns.
// Sums have a fixed order, so results do not change from run to run. Half types are storage only: values are computed
// in float32 and rounded once, where the result is written.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <optional>
#include <type_traits>
#include <utility>

#include "cuda_common.cuh"
#include "laplacian/laplacian.h"

namespace lfm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// kVector columns at a time: one load of up to 16 bytes, which asks for aligned rows.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
  T v[kVector];
};

template <int kVector, class T>
__device__ inline Pack<T, kVector> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kVector>*>(from);
}

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

// Calls body with the compile-time number of lanes, the smallest power of two >= wanted.
template <class Body>
void with_lanes(int64_t wanted, const Body& body) {
  if (wanted <= 1) return body(std::integral_constant<int, 1>{});
  if (wanted <= 2) return body(std::integral_constant<int, 2>{});
  if (wanted <= 4) return body(std::integral_constant<int, 4>{});
  if (wanted <= 8) return body(std::integral_constant<int, 8>{});
  if (wanted <= 16) return body(std::integral_constant<int, 16>{});
  return body(std::integral_constant<int, 32>{});
}

// 16-byte loads where every row of every block starts at a multiple of 16 bytes.
template <class T>
bool vectorizable(int64_t columns, std::initializer_list<const T*> blocks) {
  bool aligned = columns % (16 / sizeof(T)) == 0;
  for (const T* block : blocks) aligned = aligned && reinterpret_cast<uintptr_t>(block) % 16 == 0;
  return aligned;
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

template <int kVector, class T>
void launch(const EdgeProducts<T>& p, cudaStream_t stream) {
  // two loads to a lane: half the shuffles of the reduction
  with_lanes(ceil_div(p.columns, 2 * kVector), [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    edge_kernel<T, kVector, kLanes><<<grid_of(ceil_div(p.rows, kWarps)), kThreads, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void check_scaling(const char* name, const Tensor& t, const char* like_name, const Tensor& like, int64_t rows) {
  check_same_device(name, t, like_name, like);
  check_like(name, t, like_name, like);
  check_dim(name, t, 1);
  check_size(name, t, 0, rows);
  check_contiguous(name, t);
}

void check_block(const char* name, const Tensor& t, const Tensor& x, int64_t rows) {
  check_same_device(name, t, "x", x);
  check_like(name, t, "x", x);
  check_dim(name, t, 2);
  check_size(name, t, 0, rows);
  check_size(name, t, 1, x.size(1));
  check_contiguous(name, t);
}

// Returns the number of rows.
int64_t check_graph(const Tensor& rowptr, const Tensor& col, const Tensor& x) {
  check_cuda("x", x);
  check_dim("x", x, 2);
  check_csr(rowptr, col);
  check_same_device("rowptr", rowptr, "x", x);
  check_same_device("col", col, "x", x);
  const int64_t rows = rowptr.size(0) - 1;
  LFM_CHECK(rows <= INT32_MAX, "rowptr must number at most 2^31 - 1 nodes, got ", rows);
  return rows;
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

// One product a step: the launches of a polynomial follow each other without a word from Python.
Tensor laplacian_recurrence_cuda(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                                 Tensor x, Tensor coefficients, int64_t graphs) {
  check_recurrence(rowptr, col, weight, diagonal, left, right, x, coefficients, graphs);
  const double* abc = coefficients.const_data_ptr<double>();
  Tensor previous = x, current = x;
  for (int64_t k = 0; k < coefficients.size(0); ++k, abc += 3) {
    std::optional<Tensor> z;
    if (k > 0 && abc[2] != 0) z = previous;
    Tensor next =
        laplacian_product_cuda(rowptr, col, weight, diagonal, left, right, current, z, abc[0], abc[1], abc[2]);
    previous = current;
    current = next;
  }
  return coefficients.size(0) == 0 ? torch::stable::clone(x) : current;
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

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) {
  m.impl("laplacian_product", TORCH_BOX(&lfm::laplacian_product_cuda));
  m.impl("laplacian_recurrence", TORCH_BOX(&lfm::laplacian_recurrence_cuda));
  m.impl("edge_products", TORCH_BOX(&lfm::edge_products_cuda));
}
