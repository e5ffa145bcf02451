// The exact pass of knn on the CPU over what the filter kept: pairs in the order of tiles, so that both blocks of
// points are in the cache, then rows sorted and written (exact.h, ranked.h). Places within a block fit 16 bits.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "knn/exact.h"
#include "knn/points.h"
#include "knn/problem.h"
#include "knn/ranked.h"
#include "knn/select.h"

namespace lfm::knn {

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
