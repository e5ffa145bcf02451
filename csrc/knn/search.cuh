// One search of knn on the GPU, the host's side: a filter with proven bounds in float32 (filter.cuh) and TF32
// (tensor.cuh), then float64 differences of what is left (rank.cuh). Columns are visited in chunks that grow as the
// limits of the rows tighten (tighten.cuh), so that no n x m array exists; a row that keeps more candidates than fit is
// searched exactly over all columns. The host reads nothing back, so a call can be captured in a CUDA graph, and
// nothing depends on scheduling: the order in which candidates arrive is undone by the sort.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "knn/filter.cuh"
#include "knn/knn.h"
#include "knn/prepare.cuh"
#include "knn/rank.cuh"
#include "knn/ranked.cuh"
#include "knn/tensor.cuh"
#include "knn/tighten.cuh"

namespace lfm::knn {

constexpr int64_t kWorkspaceBytes = 512 << 20;  // most for the candidates of the rows in flight; at least one panel
constexpr int64_t kSharedBytes = 32 << 10;      // results of a row above this are sorted in global memory
constexpr int kFewPanels = 1024 / kTile;        // so few columns are kept without a test, in one chunk
constexpr int kListSlots = 1024;                // of candidates, at least; four for every neighbour
constexpr int kResultSlots = 512;               // of results, at least; two for every neighbour

inline Problem describe(int64_t n, int64_t m, int64_t d, int64_t k, bool self, Metric metric) {
  Problem p{};
  p.rows = n;
  p.columns = m;
  p.features = d;
  p.row_panels = static_cast<int>(ceil_div(n, kTile));
  p.column_panels = static_cast<int>(ceil_div(m, kTile));
  p.depth = round_up(d, kDepth);
  p.column_step = scattering_step(m);
  p.k = static_cast<int>(k);
  p.self = self;
  p.metric = metric;
  const double units = static_cast<double>(d + 32) * 0x1p-24;
  p.epsilon[kFloat] = units / (1 - units);
  p.epsilon[kTensor] = p.epsilon[kFloat] + tensor_epsilon(d);
  p.slack = static_cast<double>(d) * 0x1p-56;
  return p;
}

struct Panels {
  Buffer<float> points;
  Buffer<float2> bounds;  // of one precision after the other
  int64_t step;
  Panels(const Tensor& like, const Problem& p, int64_t batch, int64_t panels)
      : points(like, batch * panels * kTile * p.depth),
        bounds(like, kPrecisions * batch * panels * kTile),
        step(batch * panels * kTile) {}
  void bounds_to(const float2* (&out)[kPrecisions]) const {
    for (int precision = 0; precision < kPrecisions; ++precision) out[precision] = bounds.get() + precision * step;
  }
};

template <class S>
void find_extent(const S* x, const double* centre, int64_t batch, int64_t count, int64_t d, Extent* extent,
                 cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>(ceil_div(count, 4 * kThreads / kWarp), 512);
  extent_kernel<S><<<grid_of(batch * blocks), kThreads, 0, stream>>>(x, centre, count, d, blocks, extent);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, class S>
void fill_panels(const Problem& p, const S* x, const double* centre, const Extent* extent, int64_t batch,
                 bool is_column, const Panels& out, cudaStream_t stream) {
  const int64_t panels = is_column ? p.column_panels : p.row_panels;
  panel_kernel<S, T><<<grid_of(batch * panels * (kTile / kStripRows)), kThreads, 0, stream>>>(
      p, x, centre, extent, is_column, out.points.get(), out.bounds.get(), out.step);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Sizes of the candidate lists and of the groups of rows that share them. Visits are panels of columns, or, mirrored,
// the steps around the circle of panels, each of which brings a panel forwards and one backwards.
struct Plan {
  bool mirrored;
  int visits, first_visits;  // in all, and those of the first chunk, whose columns are kept without a test
  int list_panels;           // slots of a list, in panels of columns
  int row_panels;            // of a group
  int64_t sorted;            // slots for the results of a row
  bool in_shared;            // where those are
  int64_t list() const { return int64_t{list_panels} * kTile; }
  int64_t rows() const { return int64_t{row_panels} * kTile; }
  int panels_of(int visits, const Problem& p) const {
    return mirrored ? std::min(2 * visits - 1, p.column_panels) : visits;
  }
};

template <class T>
Plan plan_for(const Problem& p, int64_t batch, int64_t workspace) {
  Plan plan{};
  const double k = p.k, m = static_cast<double>(p.columns);
  const auto panels = [&](double columns) {
    return static_cast<int>(std::min<double>(p.column_panels, columns / kTile + 1));
  };
  // with the first F columns kept, k m / F of the others pass: the sum is smallest here
  int first = panels(std::max(std::sqrt(k * m), 2 * k) + kTile);
  if (p.column_panels <= kFewPanels || 2 * first >= p.column_panels) first = p.column_panels;
  plan.list_panels = panels(std::max<double>(kListSlots, 4 * k));
  first = std::min(first, plan.list_panels);
  plan.sorted = power_of_two_at_least(std::max<int64_t>(kResultSlots, int64_t{2} * p.k));
  plan.in_shared = plan.sorted * static_cast<int64_t>(sizeof(Entry<T>)) <= kSharedBytes;
  const int64_t row = plan.list() * sizeof(Candidate) + (plan.in_shared ? 0 : plan.sorted * sizeof(Entry<T>));
  const int64_t most = std::max<int64_t>(1, std::min(batch * p.row_panels, workspace / (row * kTile)));
  plan.mirrored = p.self && most >= p.row_panels;
  plan.row_panels = static_cast<int>(plan.mirrored ? most / p.row_panels * p.row_panels : most);
  plan.visits = plan.mirrored ? p.column_panels / 2 + 1 : p.column_panels;
  plan.first_visits = plan.mirrored ? (first == p.column_panels ? plan.visits : std::max(2, (first + 1) / 2)) : first;
  return plan;
}

// Visits of the chunk after `seen` of them: as many as fill about half of the free slots of a list, if their columns
// are like those seen.
inline int next_chunk(const Problem& p, const Plan& plan, int seen) {
  const double free = static_cast<double>(plan.list()) - 1.5 * p.k - kTile;
  const double grown = seen * free / (3.0 * p.k);  // the tensor cores keep up to half as many more
  const int most = std::min(plan.visits - seen, INT32_MAX / plan.row_panels);
  return grown < most ? std::max(1, static_cast<int>(grown)) : most;
}

template <class T, class S, bool kInner>
void search_group(Rank<T, S> rank, const Plan& plan, cudaStream_t stream) {
  Filter& f = rank.filter;
  const Problem& p = f.problem;
  const int64_t rows = int64_t{f.row_panels_here} * kTile;
  f.mirrored = plan.mirrored;
  f.first_column_panel = 0;
  f.column_panels_here = plan.first_visits;
  filter_kernel<true, kInner><<<grid_of(int64_t{f.row_panels_here} * f.column_panels_here), kThreads, 0, stream>>>(f);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  STD_CUDA_CHECK(cudaMemsetAsync(f.against, 0, sizeof(int), stream));
  int seen = plan.first_visits, fixed_count = plan.panels_of(seen, p) * kTile;
  while (seen < plan.visits) {
    tighten_kernel<kInner><<<grid_of(rows), kThreads, 0, stream>>>(f, fixed_count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    fixed_count = -1;
    f.first_column_panel = seen;
    f.column_panels_here = next_chunk(p, plan, seen);
    const unsigned tiles = grid_of(int64_t{f.row_panels_here} * f.column_panels_here);
    // the rows have chosen one of the two; the blocks of the other end at once
    if (f.tensor) {
      tensor_filter_kernel<kInner><<<tiles, kThreads, 0, stream>>>(f);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    filter_kernel<false, kInner><<<tiles, kThreads, 0, stream>>>(f);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    seen += f.column_panels_here;
  }
  rank.fixed_count = fixed_count;
  const size_t shared = plan.in_shared ? plan.sorted * sizeof(Entry<T>) : 0;
  rank_kernel<T, S, kInner><<<grid_of(rows), kThreads, shared, stream>>>(rank);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// y is null where x is searched in itself.
template <class T, class S, bool kInner>
void search(const Problem& p, const Tensor& like, const S* x, const S* y, int64_t batch, int64_t* indices, T* distances,
            int64_t workspace, cudaStream_t stream) {
  const S* database = p.self ? x : y;
  const Buffer<double> centre(like, batch * p.features);
  const Buffer<Extent> extent(like, 2 * batch);
  if (!kInner) {
    centre_kernel<S><<<grid_of(batch * ceil_div(p.features, kWarp)), kThreads, 0, stream>>>(database, p.columns,
                                                                                            p.features, centre.get());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const double* shift = kInner ? nullptr : centre.get();
  STD_CUDA_CHECK(cudaMemsetAsync(extent.get(), 0, 2 * batch * sizeof(Extent), stream));
  find_extent<S>(x, shift, batch, p.rows, p.features, extent.get(), stream);
  if (!p.self) find_extent<S>(y, shift, batch, p.columns, p.features, extent.get() + 1, stream);
  // both extents first: they decide one common scale
  const Panels rows(like, p, batch, p.row_panels);
  fill_panels<T, S>(p, x, shift, extent.get(), batch, false, rows, stream);
  std::optional<Panels> columns;
  if (!p.self) {
    columns.emplace(like, p, batch, p.column_panels);
    fill_panels<T, S>(p, y, shift, extent.get(), batch, true, *columns, stream);
  }
  const Panels& column_panels = columns ? *columns : rows;

  const Plan plan = plan_for<T>(p, batch, workspace);
  const Buffer<Candidate> list(like, plan.rows() * plan.list());
  const Buffer<int> count(like, plan.rows());
  const Buffer<float> limit(like, kPrecisions * plan.rows());
  const Buffer<int> against(like, 1);
  const Buffer<Entry<T>> scratch(like, plan.in_shared ? 0 : plan.rows() * plan.sorted);
  Rank<T, S> rank{};
  rank.filter.problem = p;
  rank.filter.row_panels = rows.points.get();
  rank.filter.column_panels = column_panels.points.get();
  rows.bounds_to(rank.filter.row_bounds);
  column_panels.bounds_to(rank.filter.column_bounds);
  rank.filter.candidates = {list.get(), count.get(), {limit.get(), limit.get() + plan.rows()}, plan.list()};
  rank.filter.tensor = p.depth >= kLeastTensorDepth;
  rank.filter.against = against.get();
  rank.extent = extent.get();
  rank.rows = x;
  rank.columns = database;
  rank.scratch = plan.in_shared ? nullptr : scratch.get();
  rank.capacity = static_cast<int>(plan.sorted);
  rank.indices = indices;
  rank.distances = distances;
  const int panels = static_cast<int>(batch * p.row_panels);  // fits: the grid of fill_panels has four blocks for each
  for (int panel = 0; panel < panels; panel += plan.row_panels) {
    rank.filter.first_row_panel = panel;
    rank.filter.row_panels_here = std::min(plan.row_panels, panels - panel);
    search_group<T, S, kInner>(rank, plan, stream);
  }
}

template <class T>
void make_unit(const T* x, double* unit, int64_t rows, int64_t d, cudaStream_t stream) {
  unit_kernel<T><<<grid_of(ceil_div(rows, kThreads / kWarp)), kThreads, 0, stream>>>(x, unit, rows, d);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace lfm::knn
