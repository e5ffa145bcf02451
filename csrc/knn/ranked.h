// The few results of a row of knn on the CPU that are left, sorted by (value, index), values that are not numbers last:
// a total order, so that the result does not depend on the order in which candidates came. (On the GPU: ranked.cuh.)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace lfm::knn {

// A result of a row, ordered by (value, index); values that are not numbers come last.
template <class T>
struct Ranked;

template <>
struct Ranked<double> {
  double number;
  int32_t point;
  static Ranked make(double value, int32_t index) { return {value, index}; }
  double value() const { return number; }
  int32_t index() const { return point; }
  bool operator<(const Ranked& other) const {
    if (number == other.number) return point < other.point;
    const bool last = std::isnan(number), other_last = std::isnan(other.number);
    if (last || other_last) return last == other_last ? point < other.point : other_last;
    return number < other.number;
  }
};

// One integer: the bits of the value, made monotone, over the index.
template <>
struct Ranked<float> {
  uint64_t key;
  static Ranked make(float value, int32_t index) {
    uint32_t bits;
    value += 0.0f;  // -0 and +0 are the same distance
    std::memcpy(&bits, &value, sizeof(bits));
    bits = std::isnan(value) ? 0xFFFFFFFFu : bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
    return {uint64_t{bits} << 32 | static_cast<uint32_t>(index)};
  }
  float value() const {
    auto bits = static_cast<uint32_t>(key >> 32);
    bits ^= bits >> 31 ? 0x80000000u : 0xFFFFFFFFu;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  int32_t index() const { return static_cast<int32_t>(key); }
  bool operator<(const Ranked& other) const { return key < other.key; }
};

inline void sort_ranked(Ranked<double>* items, int64_t size, std::vector<Ranked<double>>&) {
  std::sort(items, items + size);
}

// Few different keys: each goes where the number of smaller ones says. No branch depends on the keys.
struct FewKeys {
  static constexpr int64_t kMost = 64;
  uint64_t* keys;
  int64_t size;
};

template <int kBytes>
LFM_INLINE void sort_few_body(FewKeys& few) {
  constexpr int kLanes = simd::kLanes<uint64_t, kBytes>;
  using K = simd::Vec<uint64_t, kLanes>;
  uint64_t keys[FewKeys::kMost + kLanes];  // what lies behind the last is ranked too, and dropped
  std::copy_n(few.keys, few.size, keys);
  std::fill_n(keys + few.size, kLanes, 0);
  for (int64_t first = 0; first < few.size; first += kLanes) {
    const K own = simd::load<K>(keys + first);
    K rank = {};
    for (int64_t i = 0; i < few.size; ++i) rank -= (K)(simd::broadcast<K>(keys[i]) < own);
    const int64_t count = std::min<int64_t>(kLanes, few.size - first);
    for (int64_t lane = 0; lane < count; ++lane) few.keys[rank[lane]] = keys[first + lane];
  }
}
LFM_SIMD_DISPATCH(, inline void, sort_few, (FewKeys & few), (few))

// Radix sort on the bytes of the value, then runs of equal values.
inline void sort_ranked(Ranked<float>* items, int64_t size, std::vector<Ranked<float>>& scratch) {
  if (size <= FewKeys::kMost) {
    FewKeys few{&items->key, size};
    return sort_few(few);
  }
  uint32_t counts[4][256] = {};
  for (int64_t i = 0; i < size; ++i)
    for (int digit = 0; digit < 4; ++digit) ++counts[digit][items[i].key >> (32 + 8 * digit) & 255];
  scratch.resize(size);
  Ranked<float>*from = items, *to = scratch.data();
  for (int digit = 0; digit < 4; ++digit) {
    auto& count = counts[digit];
    const int shift = 32 + 8 * digit;
    if (count[from[0].key >> shift & 255] == size) continue;  // all alike in this digit
    uint32_t total = 0;
    for (auto& slot : count) {
      const uint32_t own = slot;
      slot = total;
      total += own;
    }
    for (int64_t i = 0; i < size; ++i) to[count[from[i].key >> shift & 255]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::copy_n(from, size, items);
  for (int64_t first = 0, last; first < size; first = last) {
    for (last = first + 1; last < size && items[last].key >> 32 == items[first].key >> 32;) ++last;
    if (last - first > 1) std::sort(items + first, items + last);
  }
}

}  // namespace lfm::knn
