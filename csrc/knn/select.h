// Choosing the k smallest of a stream of bounds, and sorting the few that are left.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace lfm {

// How many of values[0, size) are <= limit.
struct Count {
  const float* values;
  int64_t size;
  float limit;
  int64_t* out;
};

template <int kBytes>
LFM_INLINE void count_below_body(const Count& c) {
  constexpr int kLanes = simd::kLanes<float, kBytes>;
  using V = simd::Vec<float, kLanes>;
  using I = simd::Vec<int32_t, kLanes>;
  I matches[2] = {};
  const V limit = simd::broadcast<V>(c.limit);
  int64_t i = 0;
  for (; i + 2 * kLanes <= c.size; i += 2 * kLanes) {
    matches[0] -= simd::load<V>(c.values + i) <= limit;  // a true lane is -1
    matches[1] -= simd::load<V>(c.values + i + kLanes) <= limit;
  }
  matches[0] += matches[1];
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += matches[0][lane];
  for (; i < c.size; ++i) total += c.values[i] <= c.limit;
  *c.out = total;
}
LFM_SIMD_DISPATCH(, inline void, count_below, (const Count& c), (c))

// Positions of the values <= limit, in order; out has room for size + 8 entries.
struct Gather {
  const float* values;
  int64_t size;
  float limit;
  int32_t* out;
  int64_t* count;
};

// Written without branches: every lane stores, and only a passing one moves the end.
inline int64_t positions_from(const Gather& g, int64_t i, int64_t found) {
  for (; i < g.size; ++i) {
    g.out[found] = static_cast<int32_t>(i);
    found += g.values[i] <= g.limit;
  }
  return found;
}

#if defined(__x86_64__)
// For each mask of eight lanes, the lanes that are set, first.
struct CompressTable {
  uint8_t lanes[256][8] = {};
  constexpr CompressTable() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, at = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask][at++] = static_cast<uint8_t>(lane);
  }
};
inline constexpr CompressTable kCompress{};

LFM_TARGET_AVX2 inline void positions_below_avx2(const Gather& g) {
  const __m256 limit = _mm256_set1_ps(g.limit);
  int64_t found = 0, i = 0;
  for (; i + 8 <= g.size; i += 8) {
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(g.values + i), limit, _CMP_LE_OQ));
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[mask]));
    const __m256i positions = _mm256_add_epi32(_mm256_cvtepu8_epi32(lanes), _mm256_set1_epi32(static_cast<int>(i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(g.out + found), positions);
    found += __builtin_popcount(mask);
  }
  *g.count = positions_from(g, i, found);
}
#endif

inline void positions_below(const Gather& g) {
#if defined(__x86_64__)
  if (simd::level() != simd::Level::generic) return positions_below_avx2(g);
#endif
  *g.count = positions_from(g, 0, 0);
}

// Smallest and largest of the values that are below infinity; low > high when there are none.
struct Range {
  const float* values;
  int64_t size;
  float *low, *high;
};

template <int kBytes>
LFM_INLINE void finite_range_body(const Range& r) {
  constexpr int kLanes = simd::kLanes<float, kBytes>;
  using V = simd::Vec<float, kLanes>;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  V low = simd::broadcast<V>(kInfinity), high = -low;
  int64_t i = 0;
  for (; i + kLanes <= r.size; i += kLanes) {
    const V v = simd::load<V>(r.values + i);
    low = v < low ? v : low;
    high = (v > high) & (v < kInfinity) ? v : high;
  }
  *r.low = kInfinity;
  *r.high = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) {
    *r.low = std::min(*r.low, low[lane]);
    *r.high = std::max(*r.high, high[lane]);
  }
  for (; i < r.size; ++i) {
    *r.low = r.values[i] < *r.low ? r.values[i] : *r.low;
    if (r.values[i] > *r.high && r.values[i] < kInfinity) *r.high = r.values[i];
  }
}
LFM_SIMD_DISPATCH(, inline void, finite_range, (const Range& r), (r))

// A value t, close to the smallest possible, with at least k of the values <= t: bisection, whose passes are vector
// counts. Infinity when there are fewer than k finite values.
inline float upper_quantile(const float* values, int64_t size, int64_t k) {
  float low, high;
  finite_range({values, size, &low, &high});
  int64_t below = 0;
  if (!(low <= high)) return std::numeric_limits<float>::infinity();
  count_below({values, size, high, &below});
  if (below < k) return std::numeric_limits<float>::infinity();
  const int64_t enough = k + k / 32;
  for (int step = 0; step < 40 && below > enough; ++step) {
    const float middle = low + (high - low) / 2;
    if (!(middle > low) || !(middle < high)) break;
    int64_t count = 0;
    count_below({values, size, middle, &count});
    if (count >= k) {
      high = middle;
      below = count;
    } else {
      low = middle;
    }
  }
  return high;
}

// Columns that may be among a row's k nearest: lower bounds (relative to the row) and indices, in ascending index.
class CandidateList {
 public:
  void clear() {
    lower_.clear();
    index_.clear();
    threshold_ = std::numeric_limits<float>::infinity();
  }
  int64_t size() const { return static_cast<int64_t>(index_.size()); }
  const int32_t* indices() const { return index_.data(); }

  // Sets a first threshold from one run of columns alone, so that not all of them become candidates.
  void start(const float* lower, int64_t size, int64_t k, float gap, float spread, const float* half) {
    upper_.resize(size);
    for (int64_t c = 0; c < size; ++c) upper_[c] = lower[c] + (gap + spread * half[c]);
    threshold_ = upper_quantile(upper_.data(), size, k);
  }

  void append_below(const float* lower, int64_t size, int64_t base) {
    int64_t count = 0;
    const int64_t old = this->size();
    positions_.resize(size + 8);
    positions_below({lower, size, std::min(threshold_, std::numeric_limits<float>::max()), positions_.data(), &count});
    lower_.resize(old + count);
    index_.resize(old + count);
    for (int64_t c = 0; c < count; ++c) {
      lower_[old + c] = lower[positions_[c]];
      index_[old + c] = static_cast<int32_t>(base + positions_[c]);
    }
  }

  // Every column but `excluded`, without bounds.
  void take_all(int64_t columns, int64_t excluded) {
    index_.clear();
    for (int64_t j = 0; j < columns; ++j)
      if (j != excluded) index_.push_back(static_cast<int32_t>(j));
  }

  // Lowers the threshold to about the k-th smallest upper bound, lower + gap + spread * half[index], and drops what is
  // above it.
  void tighten(int64_t k, float gap, float spread, const float* half) {
    if (size() <= k) return;
    upper_.resize(size());
    for (int64_t c = 0; c < size(); ++c) upper_[c] = lower_[c] + (gap + spread * half[index_[c]]);
    threshold_ = std::min(threshold_, upper_quantile(upper_.data(), size(), k));
    int64_t kept = 0;
    for (int64_t c = 0; c < size(); ++c) {
      lower_[kept] = lower_[c];
      index_[kept] = index_[c];
      kept += lower_[c] <= threshold_;
    }
    lower_.resize(kept);
    index_.resize(kept);
  }

 private:
  std::vector<float> lower_, upper_;
  std::vector<int32_t> index_, positions_;
  float threshold_ = std::numeric_limits<float>::infinity();
};

template <class T>
struct Ranked {
  T value;
  int32_t index;
};

// Sorts by (value, index). For float32: radix sort on the bits, stable, and the candidates come in ascending index.
inline void sort_ranked(std::vector<Ranked<float>>& items, std::vector<Ranked<float>>& scratch) {
  const int64_t size = static_cast<int64_t>(items.size());
  const auto key = [](float value) {
    uint32_t bits;
    value += 0.0f;  // -0 and +0 are the same distance
    std::memcpy(&bits, &value, sizeof(bits));
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
  };
  if (size < 64) {
    std::stable_sort(items.begin(), items.end(),
                     [&](const auto& a, const auto& b) { return key(a.value) < key(b.value); });
    return;
  }
  uint32_t counts[4][256] = {};
  for (const auto& item : items) {
    const uint32_t bits = key(item.value);
    for (int digit = 0; digit < 4; ++digit) ++counts[digit][bits >> (8 * digit) & 255];
  }
  scratch.resize(size);
  for (int digit = 0; digit < 4; ++digit) {
    auto& count = counts[digit];
    if (count[key(items[0].value) >> (8 * digit) & 255] == size) continue;  // all alike in this digit
    uint32_t total = 0;
    for (auto& slot : count) {
      const uint32_t own = slot;
      slot = total;
      total += own;
    }
    for (const auto& item : items) scratch[count[key(item.value) >> (8 * digit) & 255]++] = item;
    items.swap(scratch);
  }
}

inline void sort_ranked(std::vector<Ranked<double>>& items, std::vector<Ranked<double>>&) {
  // values that are not numbers come last, so that the order is total
  std::stable_sort(items.begin(), items.end(), [](const auto& a, const auto& b) {
    return a.value < b.value || (std::isnan(b.value) && !std::isnan(a.value));
  });
}

}  // namespace lfm
