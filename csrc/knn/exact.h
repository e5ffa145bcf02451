// The exact pass: float64 values of the candidates, from the original points, sorted by (rounded value, index).
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "knn/points.h"
#include "knn/select.h"

namespace lfm::knn {

template <class T>
struct Problem {
  const T *x, *y;
  int64_t n, m, d, k;
  Metric metric;
  bool self;
  int64_t* indices;  // of row i at i * stride, counted from `first`
  T* distances;
  int64_t stride, first;
};

struct Pair {
  int32_t row, column;  // points
};

// Values of pairs, in float64: squared distances of the scaled points, or minus the inner products, so that smaller is
// nearer.
template <class T>
struct Exact {
  const T *x, *y;
  const double *row_scale, *column_scale;  // null: 1
  int64_t d;
  bool product;
  const Pair* pairs;
  int64_t count;
  double* out;
};

constexpr int kTogether = 4;  // pairs of a row evaluated at a time, so that their sums do not wait for one another

template <int kBytes, bool kScaled, bool kProduct, int kPairs, class T>
LFM_INLINE void exact_group(const Exact<T>& e, int64_t p) {
  // eight float64 lanes on every machine, so that the order of summation is the same everywhere
  constexpr int kLanes = simd::kLanes<double, kBytes>, kVectors = 8 / kLanes;
  using V = simd::Vec<double, kLanes>;
  using In = simd::Vec<T, kLanes>;
  const T *own = e.x + e.pairs[p].row * e.d, *other[kPairs];
  const double own_scale = kScaled ? e.row_scale[e.pairs[p].row] : 1;
  double other_scale[kPairs], total[kPairs] = {};
  V sum[kPairs][kVectors] = {};
  for (int q = 0; q < kPairs; ++q) {
    other[q] = e.y + e.pairs[p + q].column * e.d;
    other_scale[q] = kScaled ? e.column_scale[e.pairs[p + q].column] : 1;
  }
  for (int q = 0; q < kPairs; ++q) {  // the next ones lie anywhere: ask for them before they are needed
    const Pair& pair = e.pairs[std::min(p + kPairs + q, e.count - 1)];
    const char* next = reinterpret_cast<const char*>(e.y + pair.column * e.d);
    for (int64_t byte = 0; byte < std::min<int64_t>(e.d * sizeof(T), 512); byte += 64) __builtin_prefetch(next + byte);
  }
  int64_t f = 0;
  for (; f + 8 <= e.d; f += 8)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V a = simd::widened<V>(simd::load<In>(own + f + v * kLanes));
      if (kScaled) a = simd::rounded(a * own_scale);
#pragma GCC unroll 4
      for (int q = 0; q < kPairs; ++q) {
        V b = simd::widened<V>(simd::load<In>(other[q] + f + v * kLanes));
        if (kScaled) b = simd::rounded(b * other_scale[q]);
        if constexpr (kProduct) {
          sum[q][v] += a * b;
        } else {
          sum[q][v] += (a - b) * (a - b);
        }
      }
    }
  for (; f < e.d; ++f) {
    const double a = simd::rounded(static_cast<double>(own[f]) * own_scale);
    for (int q = 0; q < kPairs; ++q) {
      const double b = simd::rounded(static_cast<double>(other[q][f]) * other_scale[q]);
      total[q] += kProduct ? a * b : (a - b) * (a - b);
    }
  }
  for (int q = 0; q < kPairs; ++q) {
    for (int v = 0; v < kVectors; ++v)
      for (int lane = 0; lane < kLanes; ++lane) total[q] += sum[q][v][lane];
    e.out[p + q] = kProduct ? -total[q] : total[q];
  }
}

// Pairs come row by row: a row is read once for up to four of them.
template <int kBytes, bool kScaled, bool kProduct, class T>
LFM_INLINE void exact_loop(const Exact<T>& e) {
  for (int64_t p = 0, count; p < e.count; p += count) {
    const int64_t most = std::min<int64_t>(kTogether, e.count - p);
    for (count = 1; count < most && e.pairs[p + count].row == e.pairs[p].row;) ++count;
    switch (count) {
      case 1:
        exact_group<kBytes, kScaled, kProduct, 1>(e, p);
        break;
      case 2:
        exact_group<kBytes, kScaled, kProduct, 2>(e, p);
        break;
      case 3:
        exact_group<kBytes, kScaled, kProduct, 3>(e, p);
        break;
      default:
        exact_group<kBytes, kScaled, kProduct, kTogether>(e, p);
    }
  }
}

template <int kBytes, class T>
LFM_INLINE void exact_body(const Exact<T>& e) {
  if (e.product) return exact_loop<kBytes, false, true>(e);
  e.row_scale ? exact_loop<kBytes, true, false>(e) : exact_loop<kBytes, false, false>(e);
}

LFM_SIMD_DISPATCH(template <class T>, void, exact, (const Exact<T>& e), (e))

// The value of a pair that rows are sorted by, rounded as it is returned; inner products are negated.
template <class T>
T sort_value(Metric metric, double value) {
  switch (metric) {
    case Metric::inner_product:
      return static_cast<T>(value);
    case Metric::cosine:
      return static_cast<T>(value / 2);
    default:
      return static_cast<T>(std::sqrt(value));
  }
}

// The candidates of a block of rows, in the order of the blocks of columns: a tile of pairs is evaluated while its
// points are in the cache.
template <class T>
class KeptBlock {
 public:
  struct Entry {
    uint16_t row, column;  // within their blocks
  };
  struct Segment {
    int64_t first, last;
  };

  // keep(row) tells whether the list of a row is to be evaluated; it may shorten it.
  template <class Keep>
  void collect(CandidateLists& lists, int64_t rows, int64_t block, int64_t blocks, const Keep& keep) {
    start_.assign(blocks + 1, 0);
    length_.assign(rows, 0);
    for (int64_t row = 0; row < rows; ++row) {
      if (!keep(row)) continue;
      length_[row] = lists.size(row);
      const Candidate* list = lists.items(row);
      for (int64_t c = 0; c < length_[row]; ++c) ++start_[static_cast<uint32_t>(list[c].column) / block_of(block)];
    }
    int64_t total = 0;
    for (int64_t& start : start_) {
      total += start;
      start = total;
    }
    entries_.resize(total);
    values_.resize(total);
    for (int64_t row = rows - 1; row >= 0; --row) {
      const Candidate* list = lists.items(row);
      for (int64_t c = 0; c < length_[row]; ++c) {
        const auto column = static_cast<uint32_t>(list[c].column), owner = column / block_of(block);
        entries_[--start_[owner]] = {static_cast<uint16_t>(row), static_cast<uint16_t>(column - owner * block)};
      }
    }
  }

  Segment segment(int64_t block) const { return {start_[block], start_[block + 1]}; }
  Entry entry(int64_t e) const { return entries_[e]; }
  T& value(int64_t e) { return values_[e]; }

  // Sorts every row that was kept and writes its k nearest.
  void write(const Problem<T>& p, const int32_t* row_points, const Points& columns, int64_t block) {
    std::vector<int64_t> next(length_.size() + 1, 0);
    std::partial_sum(length_.begin(), length_.end(), next.begin() + 1);
    std::vector<Ranked<T>> all(entries_.size()), scratch;
    const auto blocks = static_cast<int64_t>(start_.size()) - 1;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t e = start_[b]; e < start_[b + 1]; ++e)
        all[next[entries_[e].row]++] = Ranked<T>::make(values_[e], columns.point[b * block + entries_[e].column]);
    const T sign = p.metric == Metric::inner_product ? T(-1) : T(1);
    Ranked<T>* items = all.data();
    for (size_t row = 0; row < length_.size(); items += length_[row++]) {
      if (length_[row] == 0) continue;
      sort_ranked(items, length_[row], scratch);
      int64_t* indices = p.indices + row_points[row] * p.stride;
      T* distances = p.distances + row_points[row] * p.stride;
      for (int64_t c = 0; c < p.k; ++c) {
        indices[c] = p.first + items[c].index();
        distances[c] = sign * items[c].value();
      }
    }
  }

 private:
  static uint32_t block_of(int64_t block) { return static_cast<uint32_t>(block); }

  std::vector<Entry> entries_;
  std::vector<T> values_;
  std::vector<int64_t> start_, length_;
};

// Evaluates pairs of points that are together in the cache.
template <class T>
class Evaluator {
 public:
  Evaluator(const Problem<T>& problem, const Points& rows, const Points& columns)
      : p_(problem), rows_(rows), columns_(columns) {}

  // A block of rows against a block of columns.
  void tile(KeptBlock<T>& left, const int32_t* left_points, int64_t right_block, const int32_t* right_points) {
    pairs_.clear();
    targets_.clear();
    add(left, left_points, left.segment(right_block), right_points, [](auto) { return true; });
    evaluate();
  }

  // Two blocks of a set with one another. A pair that both keep is evaluated once.
  void mirrored_tile(KeptBlock<T>& left, int64_t left_block, const int32_t* left_points, KeptBlock<T>& right,
                     int64_t right_block, const int32_t* right_points, int64_t block) {
    pairs_.clear();
    targets_.clear();
    copies_.clear();
    place_.resize(block * block, 0);
    const auto forward = left.segment(right_block), backward = right.segment(left_block);
    add(left, left_points, forward, right_points, [](auto) { return true; });
    for (int64_t e = forward.first; e < forward.last; ++e)
      place_[left.entry(e).row * block + left.entry(e).column] = static_cast<int32_t>(e - forward.first) + 1;
    add(right, right_points, backward, left_points, [&](int64_t e) {
      const int32_t place = place_[right.entry(e).column * block + right.entry(e).row];
      if (place == 0) return true;
      copies_.push_back({&right.value(e), &left.value(forward.first + place - 1)});
      return false;
    });
    for (int64_t e = forward.first; e < forward.last; ++e) place_[left.entry(e).row * block + left.entry(e).column] = 0;
    evaluate();
    for (const auto& copy : copies_) *copy.to = *copy.from;
  }

 private:
  struct Copy {
    T *to, *from;
  };

  template <class Wanted>
  void add(KeptBlock<T>& kept, const int32_t* own, typename KeptBlock<T>::Segment segment, const int32_t* other,
           const Wanted& wanted) {
    for (int64_t e = segment.first; e < segment.last; ++e) {
      if (!wanted(e)) continue;
      pairs_.push_back({own[kept.entry(e).row], other[kept.entry(e).column]});
      targets_.push_back(&kept.value(e));
    }
  }

  void evaluate() {
    values_.resize(pairs_.size());
    const bool scaled = p_.metric == Metric::angular || p_.metric == Metric::cosine;
    exact(Exact<T>{p_.x, p_.y, scaled ? rows_.scale.data() : nullptr, scaled ? columns_.scale.data() : nullptr, p_.d,
                   p_.metric == Metric::inner_product, pairs_.data(), static_cast<int64_t>(pairs_.size()),
                   values_.data()});
    for (size_t i = 0; i < pairs_.size(); ++i) *targets_[i] = sort_value<T>(p_.metric, values_[i]);
  }

  const Problem<T>& p_;
  const Points &rows_, &columns_;
  std::vector<Pair> pairs_;
  std::vector<T*> targets_;
  std::vector<double> values_;
  std::vector<Copy> copies_;
  std::vector<int32_t> place_;
};

}  // namespace lfm::knn
