// Choosing the k smallest of a stream of bounds, for knn on the CPU: the candidates of each row, and its limit. If k
// columns have an upper bound <= t, no column with a lower bound > t is among the k nearest: a limit of that kind is
// proven. While few columns have been seen, limits are guessed; `finish` tells whether the guesses held.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "memory.h"
#include "simd.h"

namespace lfm::knn {

// A value close to the smallest that has at least `rank` of the values at or below it, by bisection; infinity when
// there are fewer than `rank`. All values are finite.
struct Quantile {
  const float* values;
  int64_t size, rank;
  int64_t enough;  // so many at or below it are close enough
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
  constexpr int kLanes = simd::kLanes<float, kBytes>;
  using V = simd::Vec<float, kLanes>;
  float low = q.values[0], high = low;
  if (q.size >= kLanes) {
    V lows = simd::load<V>(q.values), highs = lows;
    for (int64_t i = kLanes; i + kLanes <= q.size; i += kLanes) {
      const V v = simd::load<V>(q.values + i);
      lows = v < lows ? v : lows;
      highs = v > highs ? v : highs;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      low = lows[lane] < low ? lows[lane] : low;
      high = highs[lane] > high ? highs[lane] : high;
    }
  }
  for (int64_t i = q.size / kLanes * kLanes; i < q.size; ++i) {
    low = q.values[i] < low ? q.values[i] : low;
    high = q.values[i] > high ? q.values[i] : high;
  }
  int64_t below = q.size;
  for (int step = 0; step < 40 && below > q.enough; ++step) {
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
      items_ = uninitialized<Candidate>(room_);
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
    Candidate& place = items_[row * capacity_ + count_[row]++];
    place.lower = candidate.lower;  // one by one: they come from two registers, which a joint store would have to join
    place.column = candidate.column;
  }

  // After `columns` more have been offered to every row: a limit such that very probably k of all columns lie below.
  void saw(int64_t columns) {
    seen_ += columns;
    // near the end it would drop less than it takes
    if (seen_ < 3 * estimated_ || seen_ >= columns_ - columns_ / 3) return;
    estimated_ = seen_;
    const double share = static_cast<double>(seen_) / static_cast<double>(columns_);
    const double mean = share * static_cast<double>(k_);
    const auto rank = std::min(k_, static_cast<int64_t>(std::ceil(mean + 3 * std::sqrt(mean * (1 - share)) + 4)));
    for (int64_t row = 0; row < static_cast<int64_t>(count_.size()); ++row)
      if (count_[row] > rank) lower_limit(row, rank);
  }

  // Drops what cannot be among the k nearest of a row; false if the limit was too low, or candidates did not fit.
  bool finish(int64_t row) {
    if (count_[row] < k_) return false;
    const float proven = upper_bound(row, k_, k_ + k_ / 32 + 1);
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
  float upper_bound(int64_t row, int64_t rank, int64_t enough) {
    const double unit = row_unit_[row];
    const float linear = static_cast<float>(2 * gap_.error * unit * (1 + 0x1p-20));
    const float square = static_cast<float>(gap_.square * (1 + 0x1p-20));
    const float constant = static_cast<float>((gap_.square * unit * unit + gap_.slack) * (1 + 0x1p-20));
    const Candidate* list = items(row);
    const int64_t size = count_[row];
    if (static_cast<int64_t>(upper_.size()) < size) upper_.resize(2 * size);
    const float* column_unit = gap_.column_unit;
    float* upper = upper_.data();
    for (int64_t c = 0; c < size; ++c) {
      const float other = column_unit[list[c].column];
      upper[c] = list[c].lower + (linear * other + (square * other * other + constant));
    }
    Quantile wanted{upper, size, rank, enough, 0};
    quantile(wanted);
    return wanted.out;
  }

  void lower_limit(int64_t row, int64_t rank) {
    limit_[row] = std::min(limit_[row], upper_bound(row, rank, rank + rank / 16 + 2));
    drop_above_limit(row);
  }

  void drop_above_limit(int64_t row) {
    Candidate* list = items_.get() + row * capacity_;
    const float limit = limit_[row];
    const int64_t size = count_[row];
    int64_t kept = 0;
    for (int64_t c = 0; c < size; ++c) {
      const Candidate candidate = list[c];
      list[kept] = candidate;
      kept += candidate.lower <= limit;
    }
    count_[row] = static_cast<int32_t>(kept);
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

}  // namespace lfm::knn
