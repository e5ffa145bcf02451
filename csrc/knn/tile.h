// A tile of the distance matrix of knn on the CPU: a block of rows against a block of columns, filtered in one step
// (filter.h) or in two (refine.h). What it works in belongs to one thread at a time; limits are copied before, and a
// limit that has fallen since only lets more pass.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "knn/filter.h"
#include "knn/points.h"
#include "knn/refine.h"
#include "knn/select.h"

namespace lfm::knn {

constexpr int64_t kNoDiagonal = INT64_MIN / 2;

// Part of a point set.
struct Range {
  int64_t first, count, panels;
};

// Hits of a tile, in memory that is touched only as far as it is used.
struct HitBuffer {
  std::unique_ptr<int32_t[]> where;
  std::unique_ptr<float[]> lower;
  void resize(int64_t pairs) {
    where.reset(new int32_t[pairs + 16]);
    lower.reset(new float[pairs + 16]);
  }
  Hits empty() const { return {where.get(), lower.get(), 0}; }
};

// What a thread needs to work on a tile.
struct Workspace {
  HitBuffer seen, row_hits, column_hits;
  std::vector<float> row_limit, column_limit;
  std::vector<int32_t> sums;
  CandidateLists lists;
  int64_t room = 0;
  void fit(int64_t rows, int64_t columns) {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    row_limit.assign(rows, kNever);
    column_limit.assign(columns, kNever);
    sums.resize(rows * panel_width());
    if (rows * columns <= room) return;
    room = rows * columns;
    seen.resize(room);
    row_hits.resize(room);
    column_hits.resize(room);
  }
};

class Workspaces {
 public:
  std::unique_ptr<Workspace> take() {
    const std::lock_guard<std::mutex> hold(mutex_);
    if (free_.empty()) return std::make_unique<Workspace>();
    auto workspace = std::move(free_.back());
    free_.pop_back();
    return workspace;
  }
  void give(std::unique_ptr<Workspace> workspace) {
    const std::lock_guard<std::mutex> hold(mutex_);
    free_.push_back(std::move(workspace));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

// Whether a first look in 8 bits is likely to pay: it has its preparation to earn, the fewer features the less there is
// to save, and where many neighbours are wanted it lets too much pass.
inline bool first_look_pays(int64_t n, int64_t m, int64_t d, int64_t k) {
  constexpr int64_t kLeastPoints = 4096, kLeastFeatures = 192, kLeastPerNeighbor = 64;
  constexpr int64_t kMostFeatures = 8192;  // |r'| stays below half of the smallest norm, 127: the products keep margins
  return simd::has_vnni() && std::min(n, m) >= kLeastPoints && d >= kLeastFeatures && d <= kMostFeatures &&
         kLeastPerNeighbor * k <= m;
}

// What the filter reads of some rows.
struct RowPanels {
  const int32_t* panel;
  const float *unit, *lower;
  int64_t panels;
};

struct TileHits {
  Hits rows, columns;
};

// Filters tiles under the limits in the workspace.
class TileFilter {
 public:
  // Without a first look, or after the preparation of one that units.look_norm tells of.
  TileFilter(const Points& rows, const Points& columns, const Units& units, bool self)
      : rows_(rows), columns_(columns), units_(units), self_(self) {}

  TileHits in_one_step(const Range& left, const Range& right, bool symmetric, Workspace& w) const {
    const RowPanels rows{rows_.panel.data() + left.first * rows_.pairs, rows_.unit.data() + left.first,
                         rows_.lower.data() + left.first, left.panels};
    return in_one_step(rows, right, diagonal(left, right), symmetric, w);
  }

  TileHits in_one_step(const RowPanels& rows, const Range& right, int64_t diagonal, bool symmetric,
                       Workspace& w) const {
    Strip strip = start(rows, columns_.pairs, units_.error, w.row_hits, w);
    strip.column_hits = w.column_hits.empty();
    for (int64_t panel = 0; panel < right.panels; ++panel) {
      strip.columns = columns_.panel.data() + (right.first + panel * panel_width()) * columns_.pairs;
      strip.diagonal = diagonal - panel * panel_width();
      run(strip, columns_.unit, right, panel, symmetric, w);
    }
    return {strip.row_hits, strip.column_hits};
  }

  // For limits that are known: after a first look, as long as that leaves few enough. No point is in both blocks,
  // unless the search has no first look.
  TileHits in_two_steps(const Range& left, const Range& right, bool symmetric, Workspace& w) {
    // more than this costs more than it saves; limits fall, so from time to time it is tried again
    constexpr float kMostPassed = 0.15f;
    constexpr int64_t kTryAgain = 16;
    const bool again = tiles_.fetch_add(1, std::memory_order_relaxed) % kTryAgain == 0;
    if (units_.look_norm == 0 || (passed_.load(std::memory_order_relaxed) > kMostPassed && !again))
      return in_one_step(left, right, symmetric, w);
    const Hits seen = first_look(left, right, symmetric, w);
    passed_.store(static_cast<float>(seen.count) / static_cast<float>(left.count * right.count),
                  std::memory_order_relaxed);
    Refinement r{};
    r.rows = rows_.line(left.first);
    r.columns = columns_.line(right.first);
    r.size = rows_.line_size;
    r.error = units_.error;
    r.row_unit = rows_.unit.data() + left.first;
    r.row_lower = rows_.lower.data() + left.first;
    r.row_limit = w.row_limit.data();
    r.column_unit = columns_.unit.data() + right.first;
    r.column_lower = columns_.lower.data() + right.first;
    r.column_limit = symmetric ? w.column_limit.data() : nullptr;
    r.seen = seen;
    r.row_hits = w.row_hits.empty();
    r.column_hits = w.column_hits.empty();
    refine(r);
    return {r.row_hits, r.column_hits};
  }

 private:
  int64_t diagonal(const Range& left, const Range& right) const {
    return self_ ? left.first - right.first : kNoDiagonal;
  }

  static Strip start(const RowPanels& rows, int64_t depth, int32_t error, const HitBuffer& hits, Workspace& w) {
    Strip strip{};
    strip.rows = rows.panel;
    strip.row_panels = rows.panels;
    strip.depth = depth;
    strip.error = error;
    strip.row_unit = rows.unit;
    strip.row_lower = rows.lower;
    strip.row_limit = w.row_limit.data();
    strip.sums = w.sums.data();
    strip.row_hits = hits.empty();
    return strip;
  }

  void run(Strip& strip, const std::vector<float>& unit, const Range& right, int64_t panel, bool symmetric,
           const Workspace& w) const {
    const int64_t offset = panel * panel_width(), first = right.first + offset;
    strip.column_unit = unit.data() + first;
    strip.column_lower = columns_.lower.data() + first;
    strip.column_limit = symmetric ? w.column_limit.data() + offset : nullptr;
    strip.column_offset = offset;
    filter_strip(strip);
  }

  Hits first_look(const Range& left, const Range& right, bool symmetric, Workspace& w) const {
    const FirstLook &own = rows_.look, &other = columns_.look;
    const RowPanels rows{own.panel.data() + left.first * own.quads, own.unit.data() + left.first,
                         rows_.lower.data() + left.first, left.panels};
    Strip strip = start(rows, own.quads, units_.look_error, w.seen, w);
    strip.row_start = own.start.data() + left.first;
    for (int64_t panel = 0; panel < right.panels; ++panel) {
      const int64_t offset = panel * panel_width(), columns = std::min(panel_width(), right.count - offset);
      strip.columns = other.panel.data() + (right.first + offset) * other.quads;
      strip.next_columns = reinterpret_cast<const char*>(columns_.line(right.first + offset));
      strip.next_column_bytes = columns * columns_.line_size * static_cast<int64_t>(sizeof(Features));
      const int64_t begin = left.count * panel / right.panels, end = left.count * (panel + 1) / right.panels;
      strip.next_rows = reinterpret_cast<const char*>(rows_.line(left.first + begin));
      strip.next_row_bytes = (end - begin) * rows_.line_size * static_cast<int64_t>(sizeof(Features));
      run(strip, other.unit, right, panel, symmetric, w);
    }
    return strip.row_hits;
  }

  const Points &rows_, &columns_;
  const Units& units_;
  const bool self_;
  std::atomic<int64_t> tiles_{0};
  std::atomic<float> passed_{0};  // the share of pairs that passed the last first look
};

}  // namespace lfm::knn
