// Selection of the k-th smallest key by a block of kThreads threads, for knn on the GPU: radix selection, and slots for
// what is selected. All counts are integers; the order in which slots are given out is undone by the sort (ranked.cuh).
#pragma once

#include "knn/problem.cuh"

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

}  // namespace lfm::knn
