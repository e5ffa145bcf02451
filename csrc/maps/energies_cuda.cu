// map_energies on the GPU: one block per map. The map is read once into shared memory where it fits; both of its Gram
// matrices are then summed tile by tile in registers and reduced, so that nothing per pair is written but the result.
// Within rounding of `map_energies_reference`. Every sum has a fixed order: results do not change from run to run.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda_common.cuh"
#include "maps/maps.h"

namespace lfm {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 4;  // entries of a Gram matrix to a thread: kTile x kTile
// what every device since sm_80 gives a block without asking for more
constexpr int64_t kSharedBytes = 48 * 1024 - 1024;

template <class T>
struct Maps {
  int64_t xs, m_y, m_x, pairs;
  int64_t skip_x, skip_y;  // leading functions that the Gram matrices leave out, at most all of them
  int64_t ld;              // between two rows of a map as the Gram matrices read it
  const T *C, *evals_x, *evals_y, *weight_x, *weight_y;
  int64_t evals_x_step, weight_x_step;  // from one map of y to the next; 0 where all share them
  bool evals_y_shared, weight_y_shared;
  T* out;
};

// Sum over the threads of a block, in a fixed order; the result is in thread 0. Ends with a barrier.
template <class T>
__device__ inline T block_sum(T value, T* scratch) {
  value = lanes_sum<kWarp>(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp];
  }
  __syncthreads();
  return total;
}

// Squares on and off the diagonal of G_ij = sum_k R(k, i) R(k, j), for i, j < size: this thread's share. R(k, i) lies
// at map[k * step_k + i * step_i]. Only tiles on and above the diagonal are computed; those above count twice.
template <class T>
__device__ inline void gram_sums(const T* map, int64_t count, int64_t step_k, int64_t size, int64_t step_i, T& on,
                                 T& off) {
  const int64_t tiles = ceil_div(size, kTile);
  for (int64_t task = threadIdx.x; task < tiles * tiles; task += kThreads) {
    const int64_t row = task / tiles * kTile, column = task % tiles * kTile;
    if (column < row) continue;
    T sums[kTile][kTile] = {};
    for (int64_t k = 0; k < count; ++k) {
      T a[kTile], b[kTile];
#pragma unroll
      for (int u = 0; u < kTile; ++u) {
        a[u] = row + u < size ? map[k * step_k + (row + u) * step_i] : T{0};
        b[u] = column + u < size ? map[k * step_k + (column + u) * step_i] : T{0};
      }
#pragma unroll
      for (int u = 0; u < kTile; ++u) {
#pragma unroll
        for (int v = 0; v < kTile; ++v) sums[u][v] += a[u] * b[v];
      }
    }
    T inside = 0;
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
#pragma unroll
      for (int v = 0; v < kTile; ++v) {
        const T square = sums[u][v] * sums[u][v];
        if (row + u == column + v) {
          on += square;
        } else {
          inside += square;
        }
      }
    }
    off += row == column ? inside : 2 * inside;
  }
}

// kShared: the map is copied to shared memory, rows ld apart; otherwise it is read where it lies.
template <class T, bool kShared>
__global__ void __launch_bounds__(kThreads) energies_kernel(Maps<T> p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ T scratch[kWarps];
  T* copy = reinterpret_cast<T*>(shared);
  const int64_t pair = blockIdx.x, y = pair / p.xs, x = pair % p.xs;
  const T* C = p.C + (y * p.m_y * p.xs + x) * p.m_x;
  const T *a = p.evals_x + y * p.evals_x_step + x * p.m_x, *u = p.weight_x + y * p.weight_x_step + x * p.m_x;
  const T* b = p.evals_y + (p.evals_y_shared ? y : pair) * p.m_y;
  const T* w = p.weight_y + (p.weight_y_shared ? y : pair) * p.m_y;
  T carried = 0, weighted = 0, commutator = 0;
  for (int64_t entry = threadIdx.x; entry < p.m_y * p.m_x; entry += kThreads) {
    const int64_t j = entry / p.m_x, i = entry % p.m_x;
    const T value = C[j * p.xs * p.m_x + i], square = value * value, gap = b[j] - a[i];
    carried += square;
    weighted += w[j] * u[i] * square;
    commutator += gap * gap * square;
    if (kShared) copy[j * p.ld + i] = value;
  }
  __syncthreads();
  const T* map = (kShared ? copy : C) + p.skip_y * p.ld + p.skip_x;
  T on_x = 0, off_x = 0, on_y = 0, off_y = 0;
  const int64_t rest_y = p.m_y - p.skip_y, rest_x = p.m_x - p.skip_x;
  gram_sums(map, rest_y, p.ld, rest_x, int64_t{1}, on_x, off_x);
  gram_sums(map, rest_x, int64_t{1}, rest_y, p.ld, on_y, off_y);
  const T sums[kEnergies] = {carried, weighted, commutator, on_x, off_x, on_y, off_y};
#pragma unroll
  for (int k = 0; k < kEnergies; ++k) {
    const T total = block_sum(sums[k], scratch);
    if (threadIdx.x == 0) p.out[pair * kEnergies + k] = total;
  }
}

Tensor map_energies_cuda(Tensor C, Tensor evals_x, Tensor evals_y, Tensor weight_x, Tensor weight_y, int64_t skip) {
  check_cuda("C", C);
  const MapSizes s = check_maps(C, evals_x, evals_y, weight_x, weight_y, skip);
  check_same_device("evals_x", evals_x, "C", C);
  check_same_device("evals_y", evals_y, "C", C);
  check_same_device("weight_x", weight_x, "C", C);
  check_same_device("weight_y", weight_y, "C", C);
  const DeviceScope scope(C);
  Tensor out = torch::stable::new_empty(C, {s.ys, s.xs, kEnergies});
  const int64_t pairs = s.ys * s.xs;
  if (pairs == 0) return out;
  dispatch_floating("C", C, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cudaStream_t stream = scope.stream();
    Maps<T> p{};
    p.xs = s.xs;
    p.m_y = s.m_y;
    p.m_x = s.m_x;
    p.pairs = pairs;
    p.skip_x = std::min(skip, s.m_x);
    p.skip_y = std::min(skip, s.m_y);
    p.C = C.const_data_ptr<T>();
    p.evals_x = evals_x.const_data_ptr<T>();
    p.evals_y = evals_y.const_data_ptr<T>();
    p.weight_x = weight_x.const_data_ptr<T>();
    p.weight_y = weight_y.const_data_ptr<T>();
    p.evals_x_step = evals_x.size(0) == 1 ? 0 : s.xs * s.m_x;
    p.weight_x_step = weight_x.size(0) == 1 ? 0 : s.xs * s.m_x;
    p.evals_y_shared = evals_y.size(1) == 1;
    p.weight_y_shared = weight_y.size(1) == 1;
    p.out = out.mutable_data_ptr<T>();
    // an odd distance between rows: threads that walk down a column meet different banks
    const int64_t padded = s.m_x | 1, bytes = s.m_y * padded * static_cast<int64_t>(sizeof(T));
    if (bytes <= kSharedBytes) {
      p.ld = padded;
      energies_kernel<T, true><<<grid_of(pairs), kThreads, static_cast<size_t>(bytes), stream>>>(p);
    } else {
      p.ld = s.xs * s.m_x;
      energies_kernel<T, false><<<grid_of(pairs), kThreads, 0, stream>>>(p);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace lfm

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) { m.impl("map_energies", TORCH_BOX(&lfm::map_energies_cuda)); }
