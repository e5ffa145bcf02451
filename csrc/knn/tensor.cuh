// The filter of knn on the GPU by the tensor cores: TF32 products, sums in float32.
//
// Bounds. TF32 keeps 11 bits: with p~ the rounded points, |p_i p_j - p~_i p~_j| <= (2^-10 + 2^-22) |p_i| |p_j|. A step
// of 8 features adds exact products to the sum with everything aligned to the largest term and cut below 24 bits: an
// error of at most 9 x 2^-23 of |p_i| |p_j|, in d / 8 steps less than (2 d + 64) 2^-23 with room for what the hardware
// leaves open. As |p_i| |p_j| <= h_i + h_j, the bounds of filter.cuh hold with the sum of these and of its epsilon.
#pragma once

#include "knn/filter.cuh"

namespace lfm::knn {

constexpr int kPitch = kTile + 8;      // of a feature in shared memory: the lanes of a fragment read 32 different banks
constexpr int kLeastTensorDepth = 32;  // with fewer features the copies cost more than the products

inline double tensor_epsilon(int64_t d) { return (1 + 0x1p-10) * 0x1p-10 + static_cast<double>(2 * d + 64) * 0x1p-23; }

__device__ inline unsigned tf32_of(float value) {
#ifdef __CUDA_ARCH__
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  return (__float_as_uint(value) + 0x1000u) & 0xFFFFE000u;
#endif
}

// c += a b for a warp: a 16 x 8, b 8 x 8, c 16 x 8. With g = lane / 4 and t = lane % 4 a lane holds of a the rows g and
// g + 8 at columns t (0, 1) and t + 4 (2, 3), of b the column g at rows t and t + 4, of c the rows g (0, 1) and g + 8
// (2, 3) at columns 2 t and 2 t + 1 (PTX ISA, mma.m16n8k8 with .tf32).
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDA_ARCH__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // the same by exchanges, for the emulator
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int k = 0; k < 8; ++k) {
    const int from = g * 4 + k % 4;
    const unsigned upper = __shfl_sync(kFullWarp, a[k / 4 * 2], from);
    const unsigned lower = __shfl_sync(kFullWarp, a[k / 4 * 2 + 1], from);
    const float row[2] = {__uint_as_float(upper), __uint_as_float(lower)};
    for (int n = 0; n < 2; ++n) {
      const unsigned other = __shfl_sync(kFullWarp, b[k / 4], (2 * t + n) * 4 + k % 4);
      for (int half = 0; half < 2; ++half) c[2 * half + n] += row[half] * __uint_as_float(other);
    }
  }
#endif
}

// Eight warps, two by four, with 64 rows and 32 columns of the tile each.
template <bool kInner>
__global__ void __launch_bounds__(kThreads, 2) tensor_filter_kernel(Filter f) {
  constexpr int kRowTiles = 4, kColumnTiles = 4;  // of 16 rows and 8 columns
  __shared__ __align__(16) float stages[kStages][2][kDepth * kPitch];
  if (f.precision() != kTensor) return;
  const Problem& p = f.problem;
  const Place at = place_of(f);
  if (!at.mine) return;

  const int steps = static_cast<int>(p.depth / kDepth);
  const int from = threadIdx.x * 4, into = from / kTile * kPitch + from % kTile;
  const float* rows = f.row_panels + at.row_panel * p.depth * kTile + from;
  const float* columns =
      f.column_panels + (int64_t{at.batch} * p.column_panels + at.column_panel) * p.depth * kTile + from;
  const auto fetch = [&](int step) {
    if (step < steps) {
      float (*stage)[kDepth * kPitch] = stages[step % kStages];
      __pipeline_memcpy_async(&stage[0][into], rows, 16);
      __pipeline_memcpy_async(&stage[1][into], columns, 16);
      rows += kDepth * kTile;
      columns += kDepth * kTile;
    }
    __pipeline_commit();  // empty past the end, so that the number of groups in flight is constant
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int first_row = warp / 4 * (kTile / 2), first_column = warp % 4 * (kTile / 4);
  float acc[kRowTiles][kColumnTiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // this stage has arrived for all, and all are done with the one that is refilled now
    fetch(step + kStages - 1);
    const float* row_stage = stages[step % kStages][0] + t * kPitch + first_row + g;
    const float* column_stage = stages[step % kStages][1] + t * kPitch + first_column + g;
    unsigned a[kRowTiles][4], b[kColumnTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) a[i][e] = tf32_of(row_stage[e / 2 * 4 * kPitch + i * 16 + e % 2 * 8]);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) b[j][e] = tf32_of(column_stage[e * 4 * kPitch + j * 8]);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) multiply_add(acc[i][j], a[i], b[j]);
  }

  float4* shared_tile = reinterpret_cast<float4*>(&stages[0][0][0]);
  static_assert(sizeof(stages) >= kTile / 2 * kTile * sizeof(float), "half a tile must fit");
  keep_tile<false, kInner>(f, kTensor, at, shared_tile, [&](int side, int half, float4* tile) {
    // whole warps have their lines in one half
    if ((side == 0 ? first_row : first_column) / (kTile / 2) != half) return;
    float* values = reinterpret_cast<float*>(tile);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = first_row + i * 16 + g + e / 2 * 8, column = first_column + j * 8 + 2 * t + e % 2;
          const int line = (side == 0 ? row : column) % (kTile / 2), place = side == 0 ? column : row;
          values[four_of(line, place / 4) * 4 + place % 4] = acc[i][j][e];
        }
  });
}

}  // namespace lfm::knn
