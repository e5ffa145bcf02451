// Selection by a block of kThreads threads: radix selection of the k-th smallest key, the limit of a row, and sorting.
#pragma once

#include "knn/filter.cuh"

namespace lfm::knn {

using Key = unsigned long long;

constexpr int kBins = 256;
static_assert(kBins == kThreads, "one thread clears one bin");

// Unsigned keys in the order of the values; -0 and +0 get the same, and what is not a number comes last.
__device__ inline Key key_of(float value) {
  if (isnan(value)) return 0xFFC00000u;
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ inline Key key_of(double value) {
  if (isnan(value)) return 0xFFF8000000000000ull;
  const Key bits = static_cast<Key>(__double_as_longlong(value + 0.0));
  return bits ^ (bits >> 63 ? ~Key{0} : Key{1} << 63);
}
__device__ inline void value_of(Key key, float& value) {
  const unsigned bits = static_cast<unsigned>(key);
  value = __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}
__device__ inline void value_of(Key key, double& value) {
  value = __longlong_as_double(static_cast<long long>(key ^ (key >> 63 ? Key{1} << 63 : ~Key{0})));
}

struct SelectShared {
  Key low, high;
  int histogram[kBins];
  int total, bin, below, inside;
};

// At least k keys are <= limit, if there are k; `below` keys are smaller than those of the last bin, which has
// `inside`. When the last bin is a single key, that key is the limit.
struct Selection {
  Key limit;
  int below, inside;
};

// The bin that holds the need-th key of the histogram, found by the first warp.
__device__ inline void find_bin(SelectShared& s, int need) {
  constexpr int kEach = kBins / kWarp;
  const int lane = threadIdx.x;
  int sum = 0;
  for (int b = 0; b < kEach; ++b) sum += s.histogram[lane * kEach + b];
  int through = sum;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kFullWarp, through, offset);
    if (lane >= offset) through += other;
  }
  int below = through - sum;
  if (below >= need || through < need) return;
  int bin = lane * kEach;
  while (below + s.histogram[bin] < need) below += s.histogram[bin++];
  s.bin = bin;
  s.below = below;
  s.inside = s.histogram[bin];
}

// visit(f) calls f(key) once for every key, the keys shared out over the block in any way. Digits of 8 bits from the
// first bit in which keys differ, until below + inside <= enough, or `passes` digits are done, or the key is exact.
template <class Visit>
__device__ Selection radix_select(SelectShared& s, const Visit& visit, int k, int enough, int passes) {
  if (threadIdx.x == 0) {
    s.low = ~Key{0};
    s.high = 0;
    s.total = 0;
  }
  __syncthreads();
  Key low = ~Key{0}, high = 0;
  int mine = 0;
  visit([&](Key key) {
    low = min(low, key);
    high = max(high, key);
    ++mine;
  });
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    low = min(low, __shfl_xor_sync(kFullWarp, low, offset));
    high = max(high, __shfl_xor_sync(kFullWarp, high, offset));
    mine += __shfl_xor_sync(kFullWarp, mine, offset);
  }
  if (threadIdx.x % kWarp == 0) {
    atomicMin(&s.low, low);
    atomicMax(&s.high, high);
    atomicAdd(&s.total, mine);
  }
  __syncthreads();
  low = s.low;
  high = s.high;
  Selection found{high, 0, s.total};
  int shift = low < high ? max(0, 56 - __clzll(static_cast<long long>(low ^ high))) : 0, bits = 8;
  Key prefix = low;
  while (low < high && found.below + found.inside > enough && passes-- > 0) {
    s.histogram[threadIdx.x] = 0;
    __syncthreads();
    visit([&](Key key) {
      // two shifts: shift + bits may be 64
      if (((key ^ prefix) >> shift >> bits) == 0) atomicAdd(&s.histogram[key >> shift & ((Key{1} << bits) - 1)], 1);
    });
    __syncthreads();
    if (threadIdx.x < kWarp) find_bin(s, k - found.below);
    __syncthreads();
    found.below += s.below;
    found.inside = s.inside;
    prefix = (prefix >> shift >> bits << bits | static_cast<Key>(s.bin)) << shift;
    found.limit = min(high, prefix | ((Key{1} << shift) - 1));
    if (shift == 0) break;
    bits = min(8, shift);
    shift -= bits;
  }
  __syncthreads();  // all have read s: it may be used again
  return found;
}

// A slot of a shared counter for each lane that takes one; called by whole warps.
__device__ inline int reserve(int* counter, bool take) {
  const int lane = threadIdx.x % kWarp;
  const unsigned votes = __ballot_sync(kFullWarp, take);
  int start = 0;
  if (lane == 0 && votes) start = atomicAdd(counter, __popc(votes));
  return __shfl_sync(kFullWarp, start, 0) + __popc(votes & ((1u << lane) - 1));
}

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

// One result of a row, ordered by value, then by index.
template <class T>
struct Entry;

template <>
struct Entry<float> {
  Key bits;
  static __device__ Entry make(Key key, int64_t index) { return {key << 32 | static_cast<Key>(index)}; }
  static __device__ Entry last() { return {~Key{0}}; }
  __device__ int index() const { return static_cast<int>(bits & 0x7FFFFFFF); }
  __device__ Key key() const { return bits >> 32; }
  __device__ bool operator<(const Entry& other) const { return bits < other.bits; }
};

template <>
struct Entry<double> {
  Key bits;
  long long position;  // 64 bits: no padding
  static __device__ Entry make(Key key, int64_t index) { return {key, index}; }
  static __device__ Entry last() { return {~Key{0}, INT64_MAX}; }
  __device__ int index() const { return static_cast<int>(position); }
  __device__ Key key() const { return bits; }
  __device__ bool operator<(const Entry& other) const {
    return bits < other.bits || (bits == other.bits && position < other.position);
  }
};

// Bitonic sort by the block, in shared or global memory that has room for the next power of two.
template <class E>
__device__ void sort_entries(E* list, int size) {
  int padded = 1;
  while (padded < size) padded *= 2;
  for (int i = size + threadIdx.x; i < padded; i += kThreads) list[i] = E::last();
  __syncthreads();
  for (int run = 2; run <= padded; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int t = threadIdx.x; t < padded / 2; t += kThreads) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const E a = list[i], b = list[j];
        if ((b < a) == ((i & run) == 0)) {
          list[i] = b;
          list[j] = a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace lfm::knn
