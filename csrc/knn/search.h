// One search of knn on the CPU, in three steps:
//   filter    16-bit integer products of packed points (points.h) bound every distance from both sides; columns whose
//             lower bound passes a limit of the row are kept (filter.h, select.h), where it pays after a first look
//             in 8 bits (refine.h). A set searched in itself is symmetric: each tile of the distance matrix is computed
//             once and feeds its rows and its columns.
//   exact     float64 differences of the original values for what was kept, sorted by (rounded value, index)
//             (evaluate.h)
//   again     rows whose limit turned out too low, or whose candidates did not fit, without guessing: rare, or points
//             so close together that the bounds cannot tell them apart.
// Which columns are kept depends on the limits, and those on the order in which threads come by; the result does not.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "knn/evaluate.h"
#include "knn/points.h"
#include "knn/prepare.h"
#include "knn/problem.h"
#include "knn/select.h"
#include "knn/tile.h"
#include "parallel.h"

namespace lfm::knn {

constexpr int64_t kBlockBytes = 256 << 10;  // packed points of a block: two blocks fit in the second-level cache
constexpr int64_t kMostRows = 192;          // of a block
constexpr int64_t kAgainBytes = 64 << 20;   // lists of the rows that are searched again together
constexpr int64_t kBlocksPerStep = 16;      // a block takes a step at a time for each so many there are,
constexpr int64_t kMostSteps = 4;           // up to this

inline int64_t list_capacity(int64_t k) {
  return k + k / 2 + static_cast<int64_t>(10 * std::sqrt(static_cast<double>(k))) + 64;
}

template <class T>
class Search {
 public:
  explicit Search(const Problem<T>& problem) : p_(problem), width_(panel_width()) {}

  void run(int64_t memory_budget) {
    const int64_t lists = p_.self ? p_.n * list_capacity(p_.k) * static_cast<int64_t>(sizeof(Candidate)) : 0;
    const auto fits = [&](int64_t packed) { return memory_budget <= 0 || packed + lists <= memory_budget; };
    // (of a set in itself only with the lists: tiles on the diagonal are not for two steps)
    const bool look = first_look_pays(p_.n, p_.m, p_.d, p_.k) && fits((p_.self ? p_.n : p_.n + p_.m) * (5 * p_.d + 64));
    prepare<T>(p_.x, p_.n, p_.self ? nullptr : p_.y, p_.m, p_.d, p_.metric, look, rows_, own_columns_, units_);
    // small blocks for small sets: nothing is known of the limits in the first tile of a row
    const int64_t most = std::min({kMostRows, std::max(p_.m / 10, p_.k / 2), kBlockBytes / (4 * rows_.pairs)});
    block_ = std::max<int64_t>(1, most / width_) * width_;
    if (units_.filterable) {
      p_.self&& fits(packed_bytes()) ? search_symmetric() : search_by_rows();
    } else {
      for (int64_t position = 0; position < p_.n; ++position) again_.push_back(static_cast<int32_t>(position));
    }
    search_again();
  }

 private:
  const Points& columns() const { return p_.self ? rows_ : own_columns_; }

  int64_t packed_bytes() const { return rows_.packed_bytes() + own_columns_.packed_bytes(); }

  CandidateLists::Gap gap() const {
    const double norm = units_.integer_norm;
    const bool product = p_.metric == Metric::inner_product;
    return {columns().unit.data(), static_cast<double>(units_.error), product ? 0 : 0x1p-19 * norm * norm,
            2 * units_.slack};
  }

  static Range range(const Points& points, int64_t block, int64_t rows, int64_t width) {
    const int64_t first = block * rows, count = std::min(rows, points.count - first);
    return {first, count, (count + width - 1) / width};
  }
  int64_t blocks(const Points& points) const { return (points.count + block_ - 1) / block_; }

  struct Block {
    Range range;
    CandidateLists lists;
    std::mutex mutex;
  };

  void search_symmetric() {
    const int64_t count = blocks(rows_);
    std::vector<Block> parts(count);
    parallel_tasks(count, [&](int64_t b) {
      parts[b].range = range(rows_, b, block_, width_);
      parts[b].lists.reset(parts[b].range.count, list_capacity(p_.k), p_.k, p_.n, gap(),
                           rows_.unit.data() + parts[b].range.first);
    });
    // step s visits the tiles (I, I + s), around the circle: after each step all rows have seen as many columns. Of
    // large sets each block takes a few steps in a row, while its points are in the cache.
    parallel_tasks(count, [&](int64_t b) { own_tile(parts[b]); });
    const int64_t together = std::clamp<int64_t>(count / kBlocksPerStep, 1, kMostSteps), steps = count / 2;
    parallel_tasks((steps + together - 1) / together * count, [&](int64_t task) {
      const int64_t i = task % count, first = 1 + task / count * together;
      for (int64_t step = first; step < first + together && step <= steps; ++step)
        if (2 * step < count || 2 * i < count)  // half way round an even circle the tiles come twice
          symmetric_tile(parts[i], parts[(i + step) % count]);
    });
    std::vector<KeptBlock<T>> kept(count);
    parallel_tasks(count, [&](int64_t b) {
      collect(parts[b].lists, parts[b].range, kept[b]);
      parts[b].lists = CandidateLists();
    });
    // a few blocks of columns at a time, which then stay in the last-level cache while the rows go by
    constexpr int64_t kGroup = 16;
    parallel_tasks((count + kGroup - 1) / kGroup * count, [&](int64_t task) {
      const int64_t i = task % count, first = task / count * kGroup, last = std::min(count, first + kGroup);
      if (i >= last) return;
      Evaluator<T> evaluator(p_, rows_, rows_);
      if (i >= first) evaluator.tile(kept[i], points_of(rows_, i), i, points_of(rows_, i));
      for (int64_t j = std::max(first, i + 1); j < last; ++j)
        evaluator.mirrored_tile(kept[i], i, points_of(rows_, i), kept[j], j, points_of(rows_, j), block_);
    });
    parallel_tasks(count, [&](int64_t b) {
      kept[b].write(p_, points_of(rows_, b), rows_, block_);
      kept[b] = KeptBlock<T>();
    });
  }

  const int32_t* points_of(const Points& points, int64_t block) const { return points.point.data() + block * block_; }

  // The candidates of a block; rows that have to be searched again are left out.
  void collect(CandidateLists& lists, const Range& range, KeptBlock<T>& kept) {
    kept.collect(lists, range.count, block_, blocks(columns()), [&](int64_t row) {
      if (lists.finish(row)) return true;
      const std::lock_guard<std::mutex> hold(again_mutex_);
      again_.push_back(static_cast<int32_t>(range.first + row));
      return false;
    });
  }

  void evaluate_and_write(KeptBlock<T>& kept, const int32_t* row_points) const {
    Evaluator<T> evaluator(p_, rows_, columns());
    for (int64_t c = 0; c < blocks(columns()); ++c) evaluator.tile(kept, row_points, c, points_of(columns(), c));
    kept.write(p_, row_points, columns(), block_);
  }

  static void copy_limits(Block& part, std::vector<float>& out) {
    const std::lock_guard<std::mutex> hold(part.mutex);
    std::copy_n(part.lists.limits(), part.range.count, out.begin());
    part.lists.prefetch();
  }

  void symmetric_tile(Block& left, Block& right) {
    auto workspace = workspaces_.take();
    Workspace& w = *workspace;
    w.fit(block_, block_);
    copy_limits(left, w.row_limit);
    copy_limits(right, w.column_limit);
    const TileHits hits = filter_.in_two_steps(left.range, right.range, true, w);
    const auto first_column = static_cast<int32_t>(right.range.first);
    const auto first_row = static_cast<int32_t>(left.range.first);
    {
      const std::lock_guard<std::mutex> hold(left.mutex);
      append(left.lists, hits.rows, first_column);
      left.lists.saw(right.range.count);
    }
    {
      const std::lock_guard<std::mutex> hold(right.mutex);
      const Hits& found = hits.columns;
      for (int64_t h = 0; h < found.count; ++h)
        right.lists.append(found.where[h] >> 16, {found.lower[h], first_row + (found.where[h] & 0xFFFF)});
      right.lists.saw(left.range.count);
    }
    workspaces_.give(std::move(workspace));
  }

  // The first tile of all rows of a block, against themselves: nothing is known of the limits before its first panel.
  void own_tile(Block& block) {
    auto workspace = workspaces_.take();
    Workspace& w = *workspace;
    w.fit(block_, block_);
    for (int64_t panel = 0; panel < block.range.panels; ++panel) {
      const int64_t first = block.range.first + panel * width_;
      const Range columns{first, std::min(width_, block.range.first + block.range.count - first), 1};
      std::copy_n(block.lists.limits(), block.range.count, w.row_limit.begin());
      append(block.lists, filter_.in_one_step(block.range, columns, false, w).rows, static_cast<int32_t>(first));
      block.lists.saw(columns.count);
    }
    workspaces_.give(std::move(workspace));
  }

  static void append(CandidateLists& lists, const Hits& found, int32_t first_column) {
    for (int64_t h = 0; h < found.count; ++h)
      lists.append(found.where[h] & 0xFFFF, {found.lower[h], first_column + (found.where[h] >> 16)});
  }

  // Rows against all columns: for two sets, and where the lists of all rows would not fit the budget.
  void search_by_rows() {
    // enough blocks for all threads, in whole panels
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t share = (p_.n + threads - 1) / threads;
    const int64_t rows = std::min(block_, (share + width_ - 1) / width_ * width_);
    parallel_tasks((p_.n + rows - 1) / rows, [&](int64_t b) {
      const Range left = range(rows_, b, rows, width_);
      auto workspace = workspaces_.take();
      Workspace& w = *workspace;
      w.lists.reset(left.count, list_capacity(p_.k), p_.k, p_.m, gap(), rows_.unit.data() + left.first);
      for (int64_t c = 0; c < blocks(columns()); ++c) {
        const Range right = range(columns(), c, block_, width_);
        w.fit(block_, block_);
        std::copy_n(w.lists.limits(), left.count, w.row_limit.begin());
        const TileHits hits =
            c == 0 ? filter_.in_one_step(left, right, false, w) : filter_.in_two_steps(left, right, false, w);
        append(w.lists, hits.rows, static_cast<int32_t>(right.first));
        w.lists.saw(right.count);
      }
      KeptBlock<T> kept;
      collect(w.lists, left, kept);
      evaluate_and_write(kept, rows_.point.data() + left.first);
      workspaces_.give(std::move(workspace));
    });
  }

  // The rows that are left, a few at a time, with room for every column and limits that are proven.
  void search_again() {
    const auto left = static_cast<int64_t>(again_.size());
    const int64_t most = kAgainBytes / (p_.m * static_cast<int64_t>(sizeof(Candidate)));
    const int64_t rows = std::max<int64_t>(1, std::min(width_, most));
    parallel_tasks((left + rows - 1) / rows, [&](int64_t task) {
      const int64_t first = task * rows, count = std::min(rows, left - first);
      auto workspace = workspaces_.take();
      search_again(again_.data() + first, count, *workspace);
      workspaces_.give(std::move(workspace));
    });
  }

  void search_again(const int32_t* positions, int64_t count, Workspace& w) {
    std::vector<float> unit(width_, 0.0f), lower(width_, std::numeric_limits<float>::infinity());
    if (units_.filterable) {
      for (int64_t row = 0; row < count; ++row) {
        unit[row] = rows_.unit[positions[row]];
        lower[row] = rows_.lower[positions[row]];
      }
    }
    w.lists.reset(count, p_.m, p_.k, p_.m, gap(), unit.data());
    if (units_.filterable) filter_again(positions, count, unit, lower, w);
    std::vector<int32_t> points(count);
    for (int64_t row = 0; row < count; ++row) points[row] = rows_.point[positions[row]];
    KeptBlock<T> kept;
    kept.collect(w.lists, count, block_, blocks(columns()), [&](int64_t row) {
      // values that are not numbers, or too large for the filter: Python refuses the former
      if (!units_.filterable || !w.lists.finish(row)) w.lists.take_all(row, p_.self ? positions[row] : -1);
      return true;
    });
    evaluate_and_write(kept, points.data());
  }

  void filter_again(const int32_t* positions, int64_t count, const std::vector<float>& unit,
                    const std::vector<float>& lower, Workspace& w) const {
    std::vector<int32_t> panel(rows_.pairs * width_, 0);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t from = positions[row] / width_ * rows_.pairs * width_ + positions[row] % width_;
      for (int64_t pair = 0; pair < rows_.pairs; ++pair) panel[pair * width_ + row] = rows_.panel[from + pair * width_];
    }
    for (int64_t c = 0; c < blocks(columns()); ++c) {
      const Range right = range(columns(), c, block_, width_);
      w.fit(block_, block_);
      std::copy_n(w.lists.limits(), count, w.row_limit.begin());
      const RowPanels rows{panel.data(), unit.data(), lower.data(), 1};
      const Hits found = filter_.in_one_step(rows, right, kNoDiagonal, false, w).rows;
      for (int64_t h = 0; h < found.count; ++h) {
        const int64_t row = found.where[h] & 0xFFFF;
        const auto column = static_cast<int32_t>(right.first) + (found.where[h] >> 16);
        if (!(p_.self && column == positions[row])) w.lists.append(row, {found.lower[h], column});
      }
    }
  }

  const Problem<T> p_;
  const int64_t width_;
  int64_t block_ = 0;
  Points rows_, own_columns_;  // own_columns_ is empty when a set is searched in itself
  Units units_;
  TileFilter filter_{rows_, columns(), units_, p_.self};
  Workspaces workspaces_;
  std::mutex again_mutex_;
  std::vector<int32_t> again_;  // positions of the rows to be searched again
};

template <class T>
void search(const std::vector<Problem<T>>& sets, int64_t memory_budget) {
  // small sets: one thread each, all of its work in one cache; parallel regions inside then run in place
  const auto work = [](const Problem<T>& set) { return static_cast<double>(set.n) * static_cast<double>(set.m); };
  double total = 0;
  for (const Problem<T>& set : sets) total += work(set);
  std::vector<const Problem<T>*> small;
  for (const Problem<T>& set : sets) {
    if (2 * static_cast<double>(torch::stable::get_num_threads()) * work(set) <= total) {
      small.push_back(&set);
    } else {
      Search<T>(set).run(memory_budget);
    }
  }
  parallel_tasks(static_cast<int64_t>(small.size()), [&](int64_t s) { Search<T>(*small[s]).run(memory_budget); });
}

}  // namespace lfm::knn
