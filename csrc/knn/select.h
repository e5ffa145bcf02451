// Choosing the k smallest of a stream of bounds, and sorting the few that are left.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "knn/points.h"
#include "simd.h"

namespace lfm::knn {

// A value close to the smallest that has at least `rank` of the values at or below it, by bisection; infinity when
// there are fewer than `rank`. All values are finite.
struct Quantile {
  const float* values;
  int64_t size, rank;
  float out;
};

template <int kBytes>
LFM_INLINE int64_t count_not_above(const float* values, int64_t size, float limit) {
  constexpr int kLanes = simd::kLanes<float, kBytes>;
  using V = simd::Vec<float, kLanes>;
  const V limits = simd::broadcast<V>(limit);
  int64_t count = 0, i = 0;
  for (; i + kLanes <= size; i += kLanes)
    count += __builtin_popcount(simd::lanes_not_above<kBytes>(simd::load<V>(values + i), limits));
  for (; i < size; ++i) count += values[i] <= limit;
  return count;
}

template <int kBytes>
LFM_INLINE void quantile_body(Quantile& q) {
  q.out = std::numeric_limits<float>::infinity();
  if (q.size < q.rank) return;
  float low = q.values[0], high = q.values[0];
  for (int64_t i = 1; i < q.size; ++i) {
    low = q.values[i] < low ? q.values[i] : low;
    high = q.values[i] > high ? q.values[i] : high;
  }
  int64_t below = q.size;
  const int64_t enough = q.rank + q.rank / 32;
  for (int step = 0; step < 40 && below > enough; ++step) {
    const float middle = low + (high - low) / 2;
    if (!(middle > low) || !(middle < high)) break;
    const int64_t count = count_not_above<kBytes>(q.values, q.size, middle);
    if (count >= q.rank) {
      high = middle;
      below = count;
    } else {
      low = middle;
    }
  }
  q.out = high;
}
LFM_SIMD_DISPATCH(, inline void, quantile, (Quantile & q), (q))

// A column that may be among a row's k nearest: its position, and a lower bound of its distance.
struct Candidate {
  float lower;
  int32_t column;
};

// Candidates of a block of rows. The limit of a row is above its k-th nearest for certain ("proven": k upper bounds lie
// below it) or, while few columns have been seen, very probably; which of the two, `finish` tells in the end.
class CandidateLists {
 public:
  // upper - lower of row i and column j is a_i s_j + b_i + c s_j^2, with a_i = 2 E s_i and so on: see points.h
  struct Gap {
    const float* column_unit;
    double error, square, slack;  // E, 64 u N^2 / 2, 2 slack
  };

  void reset(int64_t rows, int64_t capacity, int64_t k, int64_t columns, const Gap& gap, const float* row_unit) {
    capacity_ = std::min(capacity, columns);
    k_ = k;
    columns_ = columns;
    seen_ = estimated_ = 0;
    gap_ = gap;
    row_unit_ = row_unit;
    if (capacity_ * rows > room_) {
      room_ = capacity_ * rows;
      items_.reset(new Candidate[room_]);  // left as it is
    }
    count_.assign(rows, 0);
    trigger_.assign(rows, static_cast<int32_t>(std::min(capacity_, std::max(2 * k, k + 256))));
    limit_.assign(rows, std::numeric_limits<float>::max());
  }

  const float* limits() const { return limit_.data(); }
  const Candidate* items(int64_t row) const { return items_.get() + row * capacity_; }
  int64_t size(int64_t row) const { return count_[row]; }

  // The lists lie far apart: asks for the place where each grows next.
  void prefetch() const {
    for (size_t row = 0; row < count_.size(); ++row)
      __builtin_prefetch(items_.get() + static_cast<int64_t>(row) * capacity_ + count_[row], 1);
  }

  LFM_INLINE void append(int64_t row, Candidate candidate) {
    if (!(candidate.lower <= limit_[row])) return;
    if (__builtin_expect(count_[row] == trigger_[row], 0) && !make_room(row, candidate)) return;
    items_[row * capacity_ + count_[row]++] = candidate;
  }

  // After `columns` more have been offered to every row: a limit such that very probably k of all columns lie below.
  void saw(int64_t columns) {
    seen_ += columns;
    if (seen_ < 2 * estimated_ || seen_ >= columns_) return;
    estimated_ = seen_;
    const double share = static_cast<double>(seen_) / static_cast<double>(columns_);
    const double mean = share * static_cast<double>(k_);
    const auto rank = std::min(k_, static_cast<int64_t>(std::ceil(mean + 4 * std::sqrt(mean * (1 - share)) + 4)));
    for (int64_t row = 0; row < static_cast<int64_t>(count_.size()); ++row)
      if (count_[row] > rank) lower_limit(row, rank);
  }

  // Drops what cannot be among the k nearest of a row; false if the limit was too low, or candidates did not fit.
  bool finish(int64_t row) {
    if (count_[row] < k_) return false;
    const float proven = upper_bound(row, k_);
    if (!(proven <= limit_[row])) return false;
    limit_[row] = proven;
    drop_above_limit(row);
    return true;
  }

  // Every column but `excluded`, without bounds.
  void take_all(int64_t row, int64_t excluded) {
    count_[row] = 0;
    for (int64_t j = 0; j < columns_; ++j)
      if (j != excluded) items_[row * capacity_ + count_[row]++] = {0, static_cast<int32_t>(j)};
  }

 private:
  // About the rank-th smallest upper bound, never below it; infinity if there are fewer.
  float upper_bound(int64_t row, int64_t rank) {
    const double unit = row_unit_[row];
    const float linear = static_cast<float>(2 * gap_.error * unit * (1 + 0x1p-20));
    const float square = static_cast<float>(gap_.square * (1 + 0x1p-20));
    const float constant = static_cast<float>((gap_.square * unit * unit + gap_.slack) * (1 + 0x1p-20));
    const Candidate* list = items(row);
    upper_.resize(count_[row]);
    for (int64_t c = 0; c < count_[row]; ++c) {
      const float other = gap_.column_unit[list[c].column];
      upper_[c] = list[c].lower + (linear * other + (square * other * other + constant));
    }
    Quantile wanted{upper_.data(), count_[row], rank, 0};
    quantile(wanted);
    return wanted.out;
  }

  void lower_limit(int64_t row, int64_t rank) {
    limit_[row] = std::min(limit_[row], upper_bound(row, rank));
    drop_above_limit(row);
  }

  void drop_above_limit(int64_t row) {
    Candidate* list = items_.get() + row * capacity_;
    int32_t kept = 0;
    for (int32_t c = 0; c < count_[row]; ++c) {
      const Candidate candidate = list[c];
      list[kept] = candidate;
      kept += candidate.lower <= limit_[row];
    }
    count_[row] = kept;
  }

  // False if the candidate is not needed any more, or if the row has overflowed: it then takes nothing more.
  __attribute__((noinline)) bool make_room(int64_t row, const Candidate& candidate) {
    lower_limit(row, k_);
    if (count_[row] > capacity_ - capacity_ / 8 && capacity_ < columns_) {
      limit_[row] = -std::numeric_limits<float>::infinity();
      count_[row] = 0;
    }
    trigger_[row] = static_cast<int32_t>(std::min(capacity_, std::max<int64_t>(trigger_[row], 2 * count_[row])));
    return candidate.lower <= limit_[row];
  }

  std::unique_ptr<Candidate[]> items_;
  std::vector<int32_t> count_, trigger_;
  std::vector<float> limit_, upper_;
  const float* row_unit_ = nullptr;
  Gap gap_{};
  int64_t capacity_ = 0, room_ = 0, k_ = 0, columns_ = 0, seen_ = 0, estimated_ = 0;
};

template <class T>
struct Ranked {
  T value;
  int32_t index;
};

// Sorts by (value, index); values that are not numbers come last.
template <class T>
void sort_by_comparing(Ranked<T>* first, Ranked<T>* last) {
  std::sort(first, last, [](const Ranked<T>& a, const Ranked<T>& b) {
    if (a.value == b.value) return a.index < b.index;
    if (std::isnan(a.value) || std::isnan(b.value))
      return std::isnan(a.value) == std::isnan(b.value) ? a.index < b.index : std::isnan(b.value);
    return a.value < b.value;
  });
}

inline void sort_ranked(std::vector<Ranked<double>>& items, std::vector<Ranked<double>>&) {
  sort_by_comparing(items.data(), items.data() + items.size());
}

// For float32: radix sort on the bits, then equal values by index.
inline void sort_ranked(std::vector<Ranked<float>>& items, std::vector<Ranked<float>>& scratch) {
  const int64_t size = static_cast<int64_t>(items.size());
  const auto key = [](float value) {
    if (std::isnan(value)) return 0xFFFFFFFFu;
    uint32_t bits;
    value += 0.0f;  // -0 and +0 are the same distance
    std::memcpy(&bits, &value, sizeof(bits));
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
  };
  if (size < 64) return sort_by_comparing(items.data(), items.data() + size);
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
  for (int64_t first = 0, last; first < size; first = last) {
    for (last = first + 1; last < size && key(items[last].value) == key(items[first].value);) ++last;
    if (last - first > 1) sort_by_comparing(items.data() + first, items.data() + last);
  }
}

}  // namespace lfm::knn
