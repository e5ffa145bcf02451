// The filter of knn on the GPU: a product of panels that keeps, for each row, the columns that may be among its k
// nearest. The first columns are multiplied in float32, the others on the tensor cores (tensor.cuh) unless that would
// let far more pass.
//
// Bounds. Points are shifted to a centre (not for inner products), scaled by a power of two to magnitudes below 2 and
// rounded to float32: p. With u = 2^-24, h = |p|^2 / 2 and acc the float32 sum of p_i p_j in any order of summation,
//   | |q_i - q_j|^2 / 2 - (h_i + h_j - acc) | <= eps (h_i + h_j) + slack,   eps = (d + 32) u / (1 - (d + 32) u),
// for the unrounded points q: rounding the points costs 4 u (h_i + h_j), the sum d u |p_i| |p_j| <= d u (h_i + h_j).
// Two distances that round to the same T, which the index then orders, differ by less than 8.1 u (h_i + h_j) here: eps
// covers that too, so a column with lower > upper of another is farther after rounding as well. `slack` covers products
// that underflow and results that are denormal in T. Inner products have the same bound around -acc, with |p_i| |p_j|
// for h_i + h_j. The sums below are rounded outwards, so lower and upper are true bounds. Hence, if k columns have
// upper <= t, no column with lower > t is among the k nearest: the limit of a row is about the k-th smallest upper
// bound that it has seen. The tensor cores have the same bounds with an epsilon of their own.
#pragma once

#include <cuda_pipeline.h>

#include "knn/problem.cuh"

namespace lfm::knn {

constexpr int kDepth = 8;    // features per stage of the pipeline
constexpr int kStages = 4;   // 4 x 8 KiB of shared memory
constexpr int kBand = 8;     // row panels that consecutive blocks share columns over, for the cache
constexpr int kMicro = 8;    // rows and columns of one thread, in two runs of four
constexpr int kAcross = 16;  // threads that share a row of the tile

// A column kept for a row: the bits of acc, and the position of the column in the panels.
using Candidate = int2;

// Candidates of the rows of one group of row panels.
struct Candidates {
  Candidate* list;  // [row][capacity]
  int* count;       // may exceed the capacity: the row has overflowed
  float* limit[kPrecisions];
  int64_t capacity;
};

template <bool kInner>
__device__ inline float lower_bound(float2 row, float2 column, float acc) {
  return kInner ? __fmaf_rd(-row.x, column.x, -acc) : __fsub_rd(__fadd_rd(row.x, column.x), acc);
}
template <bool kInner>
__device__ inline float upper_bound(float2 row, float2 column, float acc) {
  return kInner ? __fmaf_ru(row.x, column.x, -acc) : __fsub_ru(__fadd_ru(row.y, column.y), acc);
}

struct Filter {
  Problem problem;
  const float *row_panels, *column_panels;
  const float2 *row_bounds[kPrecisions], *column_bounds[kPrecisions];
  Candidates candidates;
  bool tensor;                           // whether the tensor cores may be used at all
  int* against;                          // rows of the group that the tensor cores' wider bounds would cost too much
  int first_row_panel, row_panels_here;  // numbered over the batch
  // The column panels to visit. Where rows are columns and whole point sets are in flight, a tile serves both of its
  // sides, and panels are counted as steps from the row panel, around the circle of panels: half the tiles suffice.
  int first_column_panel, column_panels_here;
  bool mirrored;

  // The precision of all columns but the first: a few rows against it do not count, they are searched otherwise.
  __device__ Precision precision() const {
    return tensor && int64_t{*against} * 32 <= int64_t{row_panels_here} * kTile ? kTensor : kFloat;
  }
};

// Half a tile in shared memory: lines of kTile floats, in fours that are swapped about so that both orientations of the
// tile are written without bank conflicts.
__device__ inline int four_of(int line, int four) { return line * (kTile / 4) + (four ^ (line / 4)); }

// Keeps what passes of kTile / 2 lines: a warp takes eight of them, one at a time, a lane four of the columns. Line i
// is the row in slot first_slot + i of the lists. kDirect: the first columns, kept without a test, the candidate of
// column c in slot direct_slot + c.
template <bool kDirect, bool kInner>
__device__ inline void keep_lines(const Filter& f, Precision precision, const float4* tile, int first_slot,
                                  int column_panel, int batch, int direct_slot) {
  constexpr int kLines = kTile / 2 / (kThreads / kWarp);
  const Problem& p = f.problem;
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kLines, column = column_panel * kTile + lane * 4;
  const int slot = first_slot + first;
  float2 column_bound[4] = {}, row_bound_of_lane = {};
  float limit_of_lane = 0.0f;
  if (!kDirect) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      column_bound[c] = f.column_bounds[precision][int64_t{batch} * p.column_panels * kTile + column + c];
    if (lane < kLines) {
      row_bound_of_lane = f.row_bounds[precision][int64_t{f.first_row_panel} * kTile + slot + lane];
      limit_of_lane =
          f.candidates.limit[precision][slot + lane];  // -infinity for padding and for rows that have overflowed
    }
  }
  for (int i = 0; i < kLines; ++i) {
    const float4 four = tile[four_of(first + i, lane)];
    const float acc[4] = {four.x, four.y, four.z, four.w};
    Candidate* list = f.candidates.list + (slot + i) * f.candidates.capacity;
    if (kDirect) {
      // two at a time: slots are even here; padding is written too, rows of padding have lists
#pragma unroll
      for (int c = 0; c < 4; c += 2)
        *reinterpret_cast<int4*>(list + direct_slot + lane * 4 + c) =
            make_int4(__float_as_int(acc[c]), column + c, __float_as_int(acc[c + 1]), column + c + 1);
      continue;
    }
    float2 row_bound;
    row_bound.x = __shfl_sync(kFullWarp, row_bound_of_lane.x, i);
    row_bound.y = __shfl_sync(kFullWarp, row_bound_of_lane.y, i);
    const float limit = __shfl_sync(kFullWarp, limit_of_lane, i);
    bool pass[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) pass[c] = lower_bound<kInner>(row_bound, column_bound[c], acc[c]) <= limit;
    if (!__any_sync(kFullWarp, pass[0] || pass[1] || pass[2] || pass[3])) continue;
    unsigned votes[4];
    int total = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      votes[c] = __ballot_sync(kFullWarp, pass[c]);
      total += __popc(votes[c]);
    }
    int start = 0;
    if (lane == 0) start = atomicAdd(f.candidates.count + slot + i, total);
    start = __shfl_sync(kFullWarp, start, 0);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int at = start + __popc(votes[c] & ((1u << lane) - 1));
      if (pass[c] && at < f.candidates.capacity) list[at] = make_int2(__float_as_int(acc[c]), column + c);
      start += __popc(votes[c]);
    }
  }
}

// The tile of a block.
struct Place {
  int group_panel, row_panel, batch, own_panel, visit, column_panel;
  bool half_turn, mine;
};

__device__ inline Place place_of(const Filter& f) {
  const Problem& p = f.problem;
  const int block = static_cast<int>(blockIdx.x), band_blocks = kBand * f.column_panels_here;
  const int first_in_band = block / band_blocks * kBand, in_band = block % band_blocks;
  const int band_rows = min(kBand, f.row_panels_here - first_in_band);
  Place at;
  at.group_panel = first_in_band + in_band % band_rows;
  at.row_panel = f.first_row_panel + at.group_panel;
  at.batch = at.row_panel / p.row_panels;
  at.own_panel = at.row_panel % p.row_panels;
  at.visit = f.first_column_panel + in_band / band_rows;
  at.half_turn = f.mirrored && 2 * at.visit == p.row_panels;
  at.mine = !(at.half_turn && at.own_panel >= at.visit);  // else the other side of this tile computes it
  at.column_panel = f.mirrored ? (at.own_panel + at.visit) % p.row_panels : at.visit;
  return at;
}

// Keeps what passes of a whole tile, for its rows and, mirrored, for its columns. store(side, half, tile) writes half a
// tile, of lines that are rows (side 0) or columns, to shared memory.
template <bool kDirect, bool kInner, class Store>
__device__ inline void keep_tile(const Filter& f, Precision precision, const Place& at, float4* tile,
                                 const Store& store) {
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    if (side == 1 && !(f.mirrored && at.column_panel != at.own_panel)) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __syncthreads();
      store(side, half, tile);
      __syncthreads();
      const int first = half * kTile / 2;
      if (!kDirect && f.problem.self && at.column_panel == at.own_panel) {
        // a point is not its own neighbour: a product of -infinity has a lower bound of +infinity
        if (threadIdx.x < kTile / 2) {
          const int line = threadIdx.x, column = first + line;
          reinterpret_cast<float*>(tile + four_of(line, column / 4))[column % 4] = __int_as_float(0xFF800000);
        }
        __syncthreads();
      }
      // direct slots: the steps forwards, then those backwards; a half turn is the same step in both directions
      const int slots = side == 0 ? at.visit : at.half_turn ? at.visit : f.column_panels_here - 1 + at.visit;
      const int line_panel = at.group_panel + (side == 0 ? 0 : at.column_panel - at.own_panel);
      keep_lines<kDirect, kInner>(f, precision, tile, line_panel * kTile + first,
                                  side == 0 ? at.column_panel : at.own_panel, at.batch, slots * kTile);
    }
  }
}

template <bool kDirect, bool kInner>
__global__ void __launch_bounds__(kThreads, 2) filter_kernel(Filter f) {
  __shared__ __align__(16) float stages[kStages][2][kDepth * kTile];
  if (!kDirect && f.precision() != kFloat) return;
  const Problem& p = f.problem;
  const Place at = place_of(f);
  if (!at.mine) return;

  // a stage is 8 features of both panels, 16 bytes of each per thread
  const int steps = static_cast<int>(p.depth / kDepth), copy = threadIdx.x * 4;
  const float* rows = f.row_panels + at.row_panel * p.depth * kTile + copy;
  const float* columns =
      f.column_panels + (int64_t{at.batch} * p.column_panels + at.column_panel) * p.depth * kTile + copy;
  const auto fetch = [&](int step) {
    if (step < steps) {
      float (*stage)[kDepth * kTile] = stages[step % kStages];
      __pipeline_memcpy_async(&stage[0][copy], rows, 16);
      __pipeline_memcpy_async(&stage[1][copy], columns, 16);
      rows += kDepth * kTile;
      columns += kDepth * kTile;
    }
    __pipeline_commit();  // empty past the end, so that the number of groups in flight is constant
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);

  const int x = threadIdx.x % kAcross * 4, y = threadIdx.x / kAcross * 4;
  float acc[kMicro][kMicro] = {};
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // this stage has arrived for all, and all are done with the one that is refilled now
    fetch(step + kStages - 1);
    const float* row_stage = stages[step % kStages][0];
    const float* column_stage = stages[step % kStages][1];
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[kMicro], b[kMicro];
      *reinterpret_cast<float4*>(a) = *reinterpret_cast<const float4*>(row_stage + k * kTile + y);
      *reinterpret_cast<float4*>(a + 4) = *reinterpret_cast<const float4*>(row_stage + k * kTile + kTile / 2 + y);
      *reinterpret_cast<float4*>(b) = *reinterpret_cast<const float4*>(column_stage + k * kTile + x);
      *reinterpret_cast<float4*>(b + 4) = *reinterpret_cast<const float4*>(column_stage + k * kTile + kTile / 2 + x);
#pragma unroll
      for (int r = 0; r < kMicro; ++r)
#pragma unroll
        for (int c = 0; c < kMicro; ++c) acc[r][c] = fmaf(a[r], b[c], acc[r][c]);
    }
  }

  // the stages make room for half of the tile at a time
  float4* shared_tile = reinterpret_cast<float4*>(&stages[0][0][0]);
  static_assert(sizeof(stages) >= kTile / 2 * kTile * sizeof(float), "half a tile must fit");
  keep_tile<kDirect, kInner>(f, kFloat, at, shared_tile, [&](int side, int half, float4* tile) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float v[kMicro];
#pragma unroll
      for (int i = 0; i < kMicro; ++i) v[i] = side == 0 ? acc[half * 4 + q][i] : acc[i][half * 4 + q];
      const int line = (side == 0 ? y : x) + q, four = (side == 0 ? x : y) / 4;
      tile[four_of(line, four)] = make_float4(v[0], v[1], v[2], v[3]);
      tile[four_of(line, four + kTile / 8)] = make_float4(v[4], v[5], v[6], v[7]);
    }
  });
}

}  // namespace lfm::knn
