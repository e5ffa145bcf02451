// The exact pass of knn on the GPU, one block per row: values of the candidates in float64, in the order of summation
// of exact.h, sorted by (rounded value, index). A row whose candidates did not fit, or whose points the filter cannot
// bound, is searched over all columns instead.
#pragma once

#include "knn/filter.cuh"
#include "knn/ranked.cuh"
#include "knn/select.cuh"
#include "knn/tighten.cuh"

namespace lfm::knn {

constexpr int kPairLanes = 8;  // lanes that evaluate one pair
constexpr int kPairs = kThreads / kPairLanes;

template <class T, class S>
struct Rank {
  Filter filter;
  const Extent* extent;
  const S *rows, *columns;  // the points as they are compared: of the input, or unit rows in float64
  Entry<T>* scratch;        // [row][capacity], or null: the list is in shared memory
  int capacity;
  int fixed_count;  // candidates of every row, or -1: see the counts
  int64_t* indices;
  T* distances;
};

// Sum of the products of two points, or of their squared differences: eight partial sums, then the remainder, in the
// order of exact.h, so that values agree to the last bit. All lanes of the group get it.
template <bool kInner, class S>
__device__ inline double pair_sum(const S* a, const S* b, int64_t d) {
  const int lane = threadIdx.x % kPairLanes;
  const auto add = [&](int64_t c, double sum) {
    const double u = a[c], v = b[c];
    return kInner ? fma(u, v, sum) : fma(u - v, u - v, sum);
  };
  const int64_t whole = d / kPairLanes * kPairLanes;
  double part = 0.0, sum = 0.0;
#pragma unroll 4
  for (int64_t c = lane; c < whole; c += kPairLanes) part = add(c, part);
  for (int64_t c = whole; c < d; ++c) sum = add(c, sum);
#pragma unroll
  for (int l = 0; l < kPairLanes; ++l) sum += __shfl_sync(kFullWarp, part, l, kPairLanes);
  return sum;
}

// The key that rows are sorted by: of the value as it is returned, negated for inner products.
template <class T, bool kInner>
__device__ inline Key key_of_sum(Metric metric, double sum) {
  if (kInner) return key_of(-static_cast<T>(sum));
  return key_of(static_cast<T>(metric == Metric::cosine ? sum / 2 : sqrt(sum)));
}

template <class T, class S, bool kInner>
struct Row {
  const Rank<T, S>& r;
  const Problem& p;
  SelectShared& s;
  int& size;                           // shared
  int (&warp_ties)[kThreads / kWarp];  // shared
  Entry<T>* list;
  const S* point;
  const S* columns;
  int index;  // of the row in its point set

  // f(valid, key, column) for all columns in ascending order, kPairs at a time, called by the whole block; one lane of
  // a group has valid set, for a column that is not the point itself.
  template <class F>
  __device__ void for_each_column(const F& f) const {
    for (int64_t base = 0; base < p.columns; base += kPairs) {
      const int64_t column = base + threadIdx.x / kPairLanes;
      const double sum = pair_sum<kInner>(point, columns + min(column, p.columns - 1) * p.features, p.features);
      const bool valid = threadIdx.x % kPairLanes == 0 && column < p.columns && !(p.self && column == index);
      f(valid, key_of_sum<T, kInner>(p.metric, sum), column);
    }
  }

  // Lists the k nearest (and perhaps more) by exact values of all columns, recomputed for each digit of the selection:
  // slow, needs no memory, drops nothing.
  __device__ int search_all() const {
    const auto visit = [&](const auto& f) {
      for_each_column([&](bool valid, Key key, int64_t) {
        if (valid) f(key);
      });
    };
    const Selection found = radix_select(s, visit, p.k, r.capacity, 8);
    const bool all_fit = found.below + found.inside <= r.capacity;
    const int wanted = p.k - found.below;  // of the ties at the limit, when there are too many of them
    if (threadIdx.x == 0) size = 0;
    __syncthreads();
    int taken = 0;
    for_each_column([&](bool valid, Key key, int64_t column) {
      if (valid && (key < found.limit || (all_fit && key == found.limit)))
        list[atomicAdd(&size, 1)] = Entry<T>::make(key, column);
      if (all_fit) return;
      // ties in ascending order of the columns, behind the smaller ones
      const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
      const bool tie = valid && key == found.limit;
      const unsigned vote = __ballot_sync(kFullWarp, tie);
      if (lane == 0) warp_ties[warp] = __popc(vote);
      __syncthreads();
      int rank = taken + __popc(vote & ((1u << lane) - 1));
      for (int w = 0; w < kThreads / kWarp; ++w) {
        if (w < warp) rank += warp_ties[w];
        taken += warp_ties[w];
      }
      if (tie && rank < wanted) list[found.below + rank] = Entry<T>::make(key, column);
      __syncthreads();
    });
    __syncthreads();
    return all_fit ? size : p.k;
  }

  // Lists the candidates that the last limit leaves, evaluated exactly; -1 if they do not fit.
  __device__ int evaluate(const RowCandidates<kInner>& candidates) const {
    if (threadIdx.x == 0) size = 0;
    const float limit = limit_of<kInner>(s, candidates, p.k);
    candidates.for_each([&](const auto& item) {
      const bool take = item.valid() && item.lower <= limit;
      const int at = reserve(&size, take);
      if (take && at < r.capacity) list[at] = Entry<T>::make(0, point_of_column(p, item.candidate.y));
    });
    __syncthreads();
    const int found = size;
    if (found < p.k || found > r.capacity) return -1;
    for (int base = 0; base < found; base += kPairs) {
      const int e = base + threadIdx.x / kPairLanes;
      const int column = e < found ? list[e].index() : 0;
      const double sum = pair_sum<kInner>(point, columns + column * p.features, p.features);
      __syncwarp();  // the group has read the entry before it is replaced
      if (e < found && threadIdx.x % kPairLanes == 0)
        list[e] = Entry<T>::make(key_of_sum<T, kInner>(p.metric, sum), column);
    }
    return found;
  }
};

template <class T, class S, bool kInner>
__global__ void __launch_bounds__(kThreads) rank_kernel(Rank<T, S> r) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  __shared__ SelectShared select_shared;
  __shared__ int size, warp_ties[kThreads / kWarp];
  const Filter& f = r.filter;
  const Problem& p = f.problem;
  const int64_t slot = blockIdx.x, row_panel = f.first_row_panel + slot / kTile, batch = row_panel / p.row_panels;
  const int64_t position = row_panel % p.row_panels * kTile + slot % kTile;
  if (position >= p.rows) return;
  const int64_t index = point_of_row(p, position);
  Entry<T>* list = r.scratch ? r.scratch + slot * r.capacity : reinterpret_cast<Entry<T>*>(dynamic_shared);
  const Row<T, S, kInner> row{r,
                              p,
                              select_shared,
                              size,
                              warp_ties,
                              list,
                              r.rows + (batch * p.rows + index) * p.features,
                              r.columns + batch * p.columns * p.features,
                              static_cast<int>(index)};
  const int count = r.fixed_count >= 0 ? r.fixed_count : f.candidates.count[slot];
  int found = -1;
  if (units_of<T>(p, r.extent, batch).filterable && count <= f.candidates.capacity) {
    found = row.evaluate(RowCandidates<kInner>(f, r.fixed_count >= 0 ? kFloat : f.precision(), slot, count));
  }
  if (found < 0) found = row.search_all();
  sort_entries(list, found);
  int64_t* indices = r.indices + (batch * p.rows + index) * p.k;
  T* distances = r.distances + (batch * p.rows + index) * p.k;
  for (int e = threadIdx.x; e < p.k; e += kThreads) {
    T value;
    value_of(list[e].key(), value);
    indices[e] = list[e].index();
    distances[e] = kInner ? T(0) - value : value;
  }
}

}  // namespace lfm::knn
