// Exact k nearest neighbours on the CPU, in three steps:
//   filter    16-bit integer products of packed points (points.h) bound every distance from both sides; columns whose
//             lower bound passes a limit of the row are kept (filter.h, select.h). A set searched in itself is
//             symmetric: each tile of the distance matrix is computed once and feeds its rows and its columns.
//   exact     float64 differences of the original values for what was kept, sorted by (rounded value, index) (exact.h)
//   again     rows whose limit turned out too low, or whose candidates did not fit, without guessing: rare, or points
//             so close together that the bounds cannot tell them apart.
// Which columns are kept depends on the limits, and those on the order in which threads come by; the result does not.
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "checks.h"
#include "knn/exact.h"
#include "knn/filter.h"
#include "knn/knn.h"
#include "knn/points.h"
#include "knn/select.h"
#include "memory.h"
#include "parallel.h"

namespace lfm {
namespace {

using namespace knn;

constexpr int64_t kBlockBytes = 256 << 10;  // packed points of a block: two blocks fit in the second-level cache
constexpr int64_t kMostRows = 192;          // of a block
constexpr int64_t kAgainBytes = 64 << 20;   // lists of the rows that are searched again together
constexpr int64_t kNoDiagonal = INT64_MIN / 2;
constexpr float kNever = -std::numeric_limits<float>::infinity();

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
  HitBuffer row_hits, column_hits;
  std::vector<float> row_limit, column_limit;
  std::vector<int32_t> sums;
  CandidateLists lists;
  int64_t room = 0;
  void fit(int64_t rows, int64_t columns) {
    row_limit.assign(rows, kNever);
    column_limit.assign(columns, kNever);
    sums.resize(rows * panel_width());
    if (rows * columns <= room) return;
    room = rows * columns;
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

int64_t list_capacity(int64_t k) {
  return k + k / 2 + static_cast<int64_t>(10 * std::sqrt(static_cast<double>(k))) + 64;
}

template <class T>
class Search {
 public:
  explicit Search(const Problem<T>& problem) : p_(problem), width_(panel_width()) {}

  void run(int64_t memory_budget) {
    prepare<T>(p_.x, p_.n, p_.self ? nullptr : p_.y, p_.m, p_.d, p_.metric, rows_, own_columns_, units_);
    // small blocks for small sets: nothing is known of the limits in the first tile of a row
    const int64_t most = std::min({kMostRows, std::max(p_.m / 10, p_.k / 2), kBlockBytes / (4 * rows_.pairs)});
    block_ = std::max<int64_t>(1, most / width_) * width_;
    if (units_.filterable) {
      const int64_t lists = p_.n * list_capacity(p_.k) * static_cast<int64_t>(sizeof(Candidate));
      const bool fits = memory_budget <= 0 || packed_bytes() + lists <= memory_budget;
      p_.self&& fits ? search_symmetric() : search_by_rows();
    } else {
      for (int64_t position = 0; position < p_.n; ++position) again_.push_back(static_cast<int32_t>(position));
    }
    search_again();
  }

 private:
  const Points& columns() const { return p_.self ? rows_ : own_columns_; }

  int64_t packed_bytes() const {
    return static_cast<int64_t>((rows_.panel.size() + own_columns_.panel.size()) * sizeof(int16_t));
  }

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

  struct TileHits {
    Hits rows, columns;
  };

  // The limits are those in the workspace.
  TileHits filter_tile(const int16_t* row_panels, const float* row_unit, const float* row_lower, int64_t panels,
                       const Range& right, int64_t diagonal, bool symmetric, Workspace& w) const {
    const Points& columns = this->columns();
    Strip strip{};
    strip.rows = row_panels;
    strip.row_panels = panels;
    strip.pairs = columns.pairs;
    strip.error = units_.error;
    strip.row_unit = row_unit;
    strip.row_lower = row_lower;
    strip.row_limit = w.row_limit.data();
    strip.sums = w.sums.data();
    strip.row_hits = w.row_hits.empty();
    strip.column_hits = w.column_hits.empty();
    for (int64_t panel = 0; panel < right.panels; ++panel) {
      const int64_t offset = panel * width_, first = right.first + offset;
      strip.columns = columns.panel.data() + first * columns.pairs * 2;
      strip.column_unit = columns.unit.data() + first;
      strip.column_lower = columns.lower.data() + first;
      strip.column_limit = symmetric ? w.column_limit.data() + offset : nullptr;
      strip.column_offset = offset;
      strip.diagonal = diagonal - offset;
      filter_strip(strip);
    }
    return {strip.row_hits, strip.column_hits};
  }

  TileHits filter_tile(const Range& left, const Range& right, bool symmetric, Workspace& w) const {
    const int64_t diagonal = p_.self ? left.first - right.first : kNoDiagonal;
    return filter_tile(rows_.panel.data() + left.first * rows_.pairs * 2, rows_.unit.data() + left.first,
                       rows_.lower.data() + left.first, left.panels, right, diagonal, symmetric, w);
  }

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
    // step s visits the tiles (I, I + s), around the circle: after each step all rows have seen as many columns. Half
    // way round an even circle the tiles come twice.
    const int64_t steps = count / 2 + 1, half_turn = count % 2 == 0 ? count / 2 : 0;
    const int64_t tiles = half_turn ? (steps - 1) * count + half_turn : steps * count;
    parallel_tasks(tiles, [&](int64_t tile) {
      const int64_t step = tile / count, i = tile % count, j = (i + step) % count;
      symmetric_tile(parts[i], parts[j]);
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
    if (&left == &right) {
      own_tile(left, w);
      workspaces_.give(std::move(workspace));
      return;
    }
    copy_limits(left, w.row_limit);
    copy_limits(right, w.column_limit);
    const TileHits hits = filter_tile(left.range, right.range, true, w);
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
  void own_tile(Block& block, Workspace& w) {
    const std::lock_guard<std::mutex> hold(block.mutex);
    for (int64_t panel = 0; panel < block.range.panels; ++panel) {
      const int64_t first = block.range.first + panel * width_;
      const Range columns{first, std::min(width_, block.range.first + block.range.count - first), 1};
      std::copy_n(block.lists.limits(), block.range.count, w.row_limit.begin());
      append(block.lists, filter_tile(block.range, columns, false, w).rows, static_cast<int32_t>(first));
      block.lists.saw(columns.count);
    }
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
        append(w.lists, filter_tile(left, right, false, w).rows, static_cast<int32_t>(right.first));
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
    std::vector<int16_t> panel(rows_.pairs * width_ * 2, 0);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t from = positions[row] / width_ * rows_.pairs * width_ + positions[row] % width_;
      for (int64_t pair = 0; pair < rows_.pairs; ++pair)
        std::copy_n(rows_.panel.data() + (from + pair * width_) * 2, 2, panel.data() + (pair * width_ + row) * 2);
    }
    for (int64_t c = 0; c < blocks(columns()); ++c) {
      const Range right = range(columns(), c, block_, width_);
      w.fit(block_, block_);
      std::copy_n(w.lists.limits(), count, w.row_limit.begin());
      const Hits found = filter_tile(panel.data(), unit.data(), lower.data(), 1, right, kNoDiagonal, false, w).rows;
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

void check_database(const Tensor& x, const std::optional<Tensor>& y, int64_t dim) {
  check_dim("x", x, dim);
  check_floating("x", x);
  check_contiguous("x", x);
  if (!y) return;
  check_like("y", *y, "x", x);
  check_dim("y", *y, dim);
  if (dim == 3) check_size("y", *y, 0, x.size(0));
  check_size("y", *y, dim - 1, x.size(dim - 1));
  check_contiguous("y", *y);
}

}  // namespace

std::tuple<Tensor, Tensor> knn_cpu(Tensor x, std::optional<Tensor> y, int64_t n_neighbors, std::string metric,
                                   int64_t memory_budget) {
  check_database(x, y, 3);
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), m = y ? y->size(1) : n;
  const int64_t most = y ? m : n - 1;
  LFM_CHECK(n_neighbors >= 1 && n_neighbors <= most, "n_neighbors must be between 1 and ", most, ", got ", n_neighbors);
  LFM_CHECK(n <= INT32_MAX && m <= INT32_MAX, "a point set must have at most 2^31 - 1 points, got ", std::max(n, m));
  const Metric how = metric_of(metric);
  Tensor indices = torch::stable::new_empty(x, {batch, n, n_neighbors}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(x, {batch, n, n_neighbors});
  if (batch == 0 || n == 0) return {indices, distances};
  prefer_large_pages(indices.mutable_data_ptr<int64_t>(), indices.numel());
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* queries = x.const_data_ptr<T>();
    const T* database = y ? y->const_data_ptr<T>() : queries;
    prefer_large_pages(distances.mutable_data_ptr<T>(), distances.numel());
    std::vector<Problem<T>> sets(batch);
    for (int64_t b = 0; b < batch; ++b) {
      sets[b] = {queries + b * n * d,
                 database + b * m * d,
                 n,
                 m,
                 d,
                 n_neighbors,
                 how,
                 !y.has_value(),
                 indices.mutable_data_ptr<int64_t>() + b * n * n_neighbors,
                 distances.mutable_data_ptr<T>() + b * n * n_neighbors,
                 n_neighbors,
                 0};
    }
    search(sets, memory_budget);
  });
  return {indices, distances};
}

std::tuple<Tensor, Tensor> knn_ragged_cpu(Tensor x, std::optional<Tensor> y, Tensor offsets,
                                          std::optional<Tensor> y_offsets, int64_t n_neighbors, std::string metric,
                                          int64_t memory_budget) {
  check_database(x, y, 2);
  check_offsets("offsets", offsets, x.size(0));
  LFM_CHECK(y.has_value() == y_offsets.has_value(), "y_offsets must be given with y, and only then");
  if (y) {
    check_offsets("y_offsets", *y_offsets, y->size(0));
    check_size("y_offsets", *y_offsets, 0, offsets.size(0));
  }
  LFM_CHECK(n_neighbors >= 1, "n_neighbors must be at least 1, got ", n_neighbors);
  LFM_CHECK(x.size(0) <= INT32_MAX && (!y || y->size(0) <= INT32_MAX), "there must be at most 2^31 - 1 points");
  const Metric how = metric_of(metric);
  const int64_t d = x.size(1), *start = offsets.const_data_ptr<int64_t>();
  const int64_t* y_start = y ? y_offsets->const_data_ptr<int64_t>() : start;
  Tensor indices = torch::stable::new_empty(x, {x.size(0), n_neighbors}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(x, {x.size(0), n_neighbors});
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* queries = x.const_data_ptr<T>();
    const T* database = y ? y->const_data_ptr<T>() : queries;
    int64_t* found = indices.mutable_data_ptr<int64_t>();
    T* values = distances.mutable_data_ptr<T>();
    std::fill(found, found + indices.numel(), -1);
    const T none = std::numeric_limits<T>::infinity();
    std::fill(values, values + distances.numel(), how == Metric::inner_product ? -none : none);
    std::vector<Problem<T>> sets;
    for (int64_t s = 0; s + 1 < offsets.size(0); ++s) {
      const int64_t first = start[s], n = start[s + 1] - first, y_first = y_start[s], m = y_start[s + 1] - y_first;
      const int64_t k = std::min(n_neighbors, y ? m : n - 1);
      if (n == 0 || k <= 0) continue;
      sets.push_back({queries + first * d, database + y_first * d, n, m, d, k, how, !y.has_value(),
                      found + first * n_neighbors, values + first * n_neighbors, n_neighbors, y_first});
    }
    search(sets, memory_budget);
  });
  return {indices, distances};
}

}  // namespace lfm
