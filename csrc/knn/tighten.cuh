// The limits of rows in knn on the GPU: what a row has kept is read, its limit lowered to about the k-th smallest upper
// bound, and what lies above dropped. A limit is never below that bound, so that by filter.cuh none of the k nearest is
// lost. One block a row: no two write to the same list.
#pragma once

#include "knn/filter.cuh"
#include "knn/select.cuh"

namespace lfm::knn {

// The candidates of one row, read once: those that the registers of the block hold, the rest again for every pass.
template <bool kInner>
class RowCandidates {
 public:
  __device__ RowCandidates(const Filter& f, Precision precision, int64_t slot, int count)
      : list_(f.candidates.list + slot * f.candidates.capacity), count_(count) {
    const Problem& p = f.problem;
    const int64_t panel = f.first_row_panel + slot / kTile;
    column_bounds_ = f.column_bounds[precision] + panel / p.row_panels * p.column_panels * kTile;
    row_bound_ = f.row_bounds[precision][panel * kTile + slot % kTile];
    columns_ = static_cast<int>(p.columns);
    self_ = p.self ? static_cast<int>(panel % p.row_panels * kTile + slot % kTile) : -1;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held_[i] = candidate(i * kThreads + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) bound(held_[i]);
  }

  struct Item {
    Candidate candidate;  // column -1: none, padding, or the point itself
    unsigned upper;       // key of the upper bound
    float lower;
    __device__ bool valid() const { return candidate.y >= 0; }
  };

  // f(item) for every candidate, called by the whole block the same number of times.
  template <class F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kThreads < count_) f(held_[i]);
    }
    for (int base = kHeld * kThreads; base < count_; base += kThreads) {
      Item item = candidate(base + threadIdx.x);
      bound(item);
      f(item);
    }
  }

 private:
  static constexpr int kHeld = 8;

  __device__ Item candidate(int e) const {
    Item item;
    item.candidate = e < count_ ? list_[e] : make_int2(0, -1);
    if (item.candidate.y == self_ || item.candidate.y >= columns_) item.candidate.y = -1;
    return item;
  }
  __device__ void bound(Item& item) const {
    const float2 column = column_bounds_[max(item.candidate.y, 0)];
    const float acc = __int_as_float(item.candidate.x);
    item.upper = static_cast<unsigned>(key_of(upper_bound<kInner>(row_bound_, column, acc)));
    item.lower = lower_bound<kInner>(row_bound_, column, acc);
  }

  const Candidate* list_;
  int count_, columns_, self_;
  const float2* column_bounds_;
  float2 row_bound_;
  Item held_[kHeld];
};

// About the k-th smallest upper bound, never below it; infinity if there are fewer than k candidates.
template <bool kInner>
__device__ float limit_of(SelectShared& s, const RowCandidates<kInner>& row, int k) {
  const auto visit = [&](const auto& f) {
    row.for_each([&](const auto& item) {
      if (item.valid()) f(Key{item.upper});
    });
  };
  const Selection found = radix_select(s, visit, k, k + k / 16, 3);
  if (found.below + found.inside < k) return __int_as_float(0x7F800000);
  float limit;
  value_of(found.limit, limit);
  return limit;
}

// After some columns: lowers the limits of the rows and drops the candidates above them. One block per row. After the
// first columns (fixed_count of them) a row also says what the tensor cores would cost it: its limits for both
// precisions are written, and what either of them needs is kept.
template <bool kInner>
__global__ void __launch_bounds__(kThreads) tighten_kernel(Filter f, int fixed_count) {
  __shared__ SelectShared shared;
  __shared__ int kept, kept_in_float;
  const Problem& p = f.problem;
  const int64_t slot = blockIdx.x, row = (f.first_row_panel + slot / kTile) % p.row_panels * kTile + slot % kTile;
  const int count = row >= p.rows ? 0 : fixed_count >= 0 ? fixed_count : f.candidates.count[slot];
  if (row >= p.rows || count > f.candidates.capacity) {
    if (threadIdx.x == 0) {  // takes nothing more
      f.candidates.count[slot] = count;
      for (float* limit : f.candidates.limit) limit[slot] = __int_as_float(0xFF800000);
    }
    return;
  }
  if (threadIdx.x == 0) kept = kept_in_float = 0;
  __syncthreads();
  const bool first = fixed_count >= 0 && f.tensor;
  float limit_in_float = 0.0f;
  if (first) {
    const RowCandidates<kInner> candidates(f, kFloat, slot, count);
    limit_in_float = limit_of<kInner>(shared, candidates, p.k);
    candidates.for_each(
        [&](const auto& item) { reserve(&kept_in_float, item.valid() && item.lower <= limit_in_float); });
  }
  Candidate* list = f.candidates.list + slot * f.candidates.capacity;
  const RowCandidates<kInner> candidates(f, first ? kTensor : f.precision(), slot, count);
  const float limit = limit_of<kInner>(shared, candidates, p.k);
  candidates.for_each([&](const auto& item) {
    const bool keep = item.valid() && item.lower <= limit;
    __syncthreads();  // every candidate up to here has been read: what is kept goes to slots no further on
    const int at = reserve(&kept, keep);
    if (keep) list[at] = item.candidate;
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    f.candidates.count[slot] = kept;
    f.candidates.limit[kFloat][slot] = first ? limit_in_float : limit;
    f.candidates.limit[kTensor][slot] = limit;
    if (first && kept > kept_in_float + kept_in_float / 2 + 64) atomicAdd(f.against, 1);
  }
}

}  // namespace lfm::knn
