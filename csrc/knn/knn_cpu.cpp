// Exact k nearest neighbours on the CPU.
//
// Pass 1, the filter: a float32 product of packed panels gives, for every pair, a lower bound of its distance. Only
// columns whose lower bound passes the row's threshold are kept, and the threshold is the k-th smallest UPPER bound
// seen so far, so no true neighbour can be lost (bounds below). Pass 2 evaluates the kept pairs exactly, by float64
// differences of the original values, and sorts by (value rounded to the output's dtype, index).
//
// Bounds. Points are shifted to their mean (not for inner products), scaled by a power of two to at most 1 and rounded
// to float32: p. With u = 2^-24, h = |p|^2 / 2 and acc the float32 product <p_i, p_j>, in any order of summation,
//   | |q_i - q_j|^2 / 2 - (h_i + h_j - acc) | <= eps (h_i + h_j) + slack,   eps = (d + 32) u,
// because |p_i| |p_j| <= h_i + h_j; the 32 u cover the rounding of points, norms and thresholds, and equal values after
// rounding of the output; `slack` covers underflow and the float64 rounding of the shifted points q. For inner products
// the same bound holds around -acc. So with g = h (1 - eps) - slack / 2 (inner product: -h eps - slack / 2)
//   lower = g_i + g_j - acc,   upper = lower + 2 eps (h_i + h_j) + 2 slack.
// Within a row the constants of i drop out.
#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"
#include "knn/knn.h"
#include "knn/select.h"
#include "parallel.h"
#include "simd.h"

namespace lfm {
namespace {

enum class Metric { euclidean, cosine, angular, inner_product };

Metric metric_of(const std::string& metric) {
  if (metric == "euclidean") return Metric::euclidean;
  if (metric == "cosine") return Metric::cosine;
  if (metric == "angular") return Metric::angular;
  LFM_CHECK(metric == "inner_product", "metric must be one of 'euclidean', 'cosine', 'angular', 'inner_product', got '",
            metric, "'");
  return Metric::inner_product;
}

constexpr int kPanelVectors = 3;   // a panel is this many vectors of points
constexpr int64_t kRowPanels = 2;  // panels of rows a task works on
constexpr int64_t kDepth = 128;    // features multiplied before the sums are written out: two panels then fit in L1
constexpr int64_t kAhead = 4;      // candidates fetched ahead in the exact pass
constexpr int64_t kChunkFloats = 2048;  // columns whose lower bounds are held at a time

// One point set, packed for the filter.
struct Packed {
  int64_t count = 0, panels = 0;
  std::vector<float> panel;        // [panels][d][width]
  std::vector<float> bound, half;  // g and h, padded to whole panels: g with infinity, so that padding never passes
  std::vector<double> scale;       // 1, or 1 / |x| for the angular metrics
};

// Power-of-two factor that brings the largest magnitude to at most 1, and the slack that goes with it.
struct Units {
  std::vector<double> centre;
  double factor = 1, slack = 0, epsilon = 0;
};

template <class T>
void find_scales(const T* x, int64_t n, int64_t d, Metric metric, Packed& out) {
  out.count = n;
  out.scale.assign(n, 1.0);
  if (metric != Metric::angular && metric != Metric::cosine) return;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0, largest = 0;
    for (int64_t c = 0; c < d; ++c) largest = std::max(largest, std::abs(static_cast<double>(x[i * d + c])));
    if (largest == 0) continue;  // refused by Python; as an operator, a zero row is the zero vector
    for (int64_t c = 0; c < d; ++c) {
      const double v = x[i * d + c] / largest;
      sum += v * v;
    }
    out.scale[i] = 1 / largest / std::sqrt(sum);
  }
}

template <class T>
Units find_units(const T* x, const Packed& px, const T* y, const Packed* py, int64_t d, Metric metric) {
  Units units;
  units.centre.assign(d, 0.0);
  if (metric != Metric::inner_product) {
    const double share = 1.0 / px.count;
    for (int64_t i = 0; i < px.count; ++i)
      for (int64_t c = 0; c < d; ++c) units.centre[c] += share * (x[i * d + c] * px.scale[i]);
  }
  double largest = 0, magnitude = 0;
  const auto scan = [&](const T* points, const Packed& packed) {
    for (int64_t i = 0; i < packed.count; ++i)
      for (int64_t c = 0; c < d; ++c) {
        const double value = points[i * d + c] * packed.scale[i];
        magnitude = std::max(magnitude, std::abs(value));
        largest = std::max(largest, std::abs(value - units.centre[c]));
      }
  };
  scan(x, px);
  if (py) scan(y, *py);
  int exponent = 0;
  if (largest > 0 && std::isfinite(largest)) std::frexp(largest, &exponent);
  // two steps: 2^-exponent itself may overflow
  units.factor = std::ldexp(1.0, std::min(1000, -exponent));
  const double rounding = 0x1p-52 * (magnitude + largest) * units.factor;  // float64 error of a shifted coordinate
  const double root = std::sqrt(static_cast<double>(d));
  units.slack = d * 0x1p-118 + 4 * root * rounding * (root + root * rounding);
  units.epsilon = 1.01 * static_cast<double>(d + 32) * 0x1p-24;
  return units;
}

template <class T>
void pack_panel(const T* x, int64_t d, const Units& units, Metric metric, int64_t width, int64_t p, Packed& out) {
  float* panel = out.panel.data() + p * d * width;
  for (int64_t lane = 0; lane < width; ++lane) {
    const int64_t i = p * width + lane;
    if (i >= out.count) {
      for (int64_t c = 0; c < d; ++c) panel[c * width + lane] = 0;
      out.half[i] = 0;
      out.bound[i] = std::numeric_limits<float>::infinity();
      continue;
    }
    double norm = 0;
    for (int64_t c = 0; c < d; ++c) {
      const float v = static_cast<float>((x[i * d + c] * out.scale[i] - units.centre[c]) * units.factor);
      panel[c * width + lane] = v;
      norm += static_cast<double>(v) * v;
    }
    const double half = norm / 2, sign = metric == Metric::inner_product ? 0 : 1;
    out.half[i] = static_cast<float>(half);
    out.bound[i] = static_cast<float>(half * (sign - units.epsilon) - units.slack / 2);
  }
}

// acc[r][v] = sum over kDepth features of a panel of rows times a panel of columns.
struct Tile {
  const float *rows, *columns;  // panels, already at the first feature
  int64_t depth;
  float* out;
  int64_t stride;
  bool add;
  const float* bound;  // of the columns, on the last slice of features: out = bound - acc
};

template <int kBytes>
LFM_INLINE void tile_body(const Tile& t) {
  constexpr int kLanes = simd::kLanes<float, kBytes>, kWidth = kPanelVectors * kLanes;
  constexpr int kRows = kBytes == 64 ? 8 : 4;
  using V = simd::Vec<float, kLanes>;
  static_assert(kWidth % kRows == 0);
  for (int first = 0; first < kWidth; first += kRows) {
    V acc[kRows][kPanelVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kPanelVectors; ++v)
        acc[r][v] = t.add ? simd::load<V>(t.out + (first + r) * t.stride + v * kLanes) : V{};
    const float *a = t.rows + first, *b = t.columns;
    for (int64_t k = 0; k < t.depth; ++k, a += kWidth, b += kWidth) {
      V column[kPanelVectors];
      for (int v = 0; v < kPanelVectors; ++v) column[v] = simd::load<V>(b + v * kLanes);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kPanelVectors; ++v) acc[r][v] += a[r] * column[v];
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kPanelVectors; ++v)
        simd::store(t.out + (first + r) * t.stride + v * kLanes,
                    t.bound ? simd::load<V>(t.bound + v * kLanes) - acc[r][v] : acc[r][v]);
  }
}

LFM_SIMD_DISPATCH(, void, tile, (const Tile& t), (t))

int64_t panel_width() {
  switch (simd::level()) {
    case simd::Level::avx512:
      return kPanelVectors * 16;
    case simd::Level::avx2:
      return kPanelVectors * 8;
    default:
      return kPanelVectors * 4;
  }
}

// Exact values of one row's pairs, in float64: squared distances of the scaled points, or minus the inner products, so
// that smaller is nearer.
template <class T>
struct Exact {
  const double* row;  // scaled
  const T* points;
  const double* scale;
  int64_t d;
  bool product;
  const int32_t* index;
  int64_t count;
  double* out;
};

template <int kBytes, class T>
LFM_INLINE void exact_body(const Exact<T>& e) {
  // eight float64 lanes on every machine, so that the order of summation is the same everywhere
  constexpr int kLanes = simd::kLanes<double, kBytes>, kVectors = 8 / kLanes;
  using V = simd::Vec<double, kLanes>;
  using In = simd::Vec<T, kLanes>;
  for (int64_t c = 0; c < e.count; ++c) {
    const T* point = e.points + e.index[c] * e.d;
    if (c + kAhead < e.count) {  // the candidates lie anywhere: ask for one before it is needed
      const char* next = reinterpret_cast<const char*>(e.points + e.index[c + kAhead] * e.d);
      for (int64_t byte = 0; byte < std::min<int64_t>(e.d * sizeof(T), 512); byte += 64)
        __builtin_prefetch(next + byte);
    }
    const double scale = e.scale[e.index[c]];
    V sum[kVectors] = {};
    double total = 0;
    int64_t f = 0;
    for (; f + 8 <= e.d; f += 8)
      for (int v = 0; v < kVectors; ++v) {
        const V other = __builtin_convertvector(simd::load<In>(point + f + v * kLanes), V);
        const V own = simd::load<V>(e.row + f + v * kLanes);
        if (e.product) {
          sum[v] += own * other;
        } else {
          const V difference = own - simd::rounded(other * scale);
          sum[v] += difference * difference;
        }
      }
    for (; f < e.d; ++f) {
      const double other = static_cast<double>(point[f]), difference = e.row[f] - simd::rounded(other * scale);
      total += e.product ? e.row[f] * other : difference * difference;
    }
    for (int v = 0; v < kVectors; ++v)
      for (int lane = 0; lane < kLanes; ++lane) total += sum[v][lane];
    e.out[c] = e.product ? -total : total;
  }
}

LFM_SIMD_DISPATCH(template <class T>, void, exact, (const Exact<T>& e), (e))

template <class T>
struct Problem {
  const T *x, *y;
  int64_t n, m, d, k;
  Metric metric;
  bool self;
  int64_t* indices;
  T* distances;
};

// The value of a pair as it is returned, and whether larger values come first.
template <class T>
T finish(Metric metric, double value) {
  switch (metric) {
    case Metric::inner_product:
      return static_cast<T>(-value);
    case Metric::cosine:
      return static_cast<T>(value / 2);
    default:
      return static_cast<T>(std::sqrt(value));
  }
}

// Rows [first, first + rows) of one point set: filter over all columns, then the exact pass.
template <class T>
class RowBlock {
 public:
  RowBlock(const Problem<T>& problem, const Packed& rows, const Packed& columns, const Units& units)
      : p_(problem), rows_(rows), columns_(columns), units_(units), width_(panel_width()) {}

  void run(int64_t first_panel) {
    const int64_t panels = std::min(kRowPanels, rows_.panels - first_panel);
    const int64_t first = first_panel * width_, count = std::min(panels * width_, p_.n - first);
    const int64_t chunk_panels = std::max<int64_t>(1, kChunkFloats / width_);
    candidates_.resize(count);
    for (auto& list : candidates_) list.clear();
    lower_.resize(panels * width_ * chunk_panels * width_);
    for (int64_t column = 0; column < columns_.panels; column += chunk_panels) {
      const int64_t now = std::min(chunk_panels, columns_.panels - column), stride = chunk_panels * width_;
      multiply(first_panel, panels, column, now, stride);
      const int64_t base = column * width_, size = std::min(now * width_, p_.m - base);
      for (int64_t r = 0; r < count; ++r) collect(first + r, base, size, lower_.data() + r * stride, candidates_[r]);
    }
    for (int64_t r = 0; r < count; ++r) rank(first + r, candidates_[r]);
  }

 private:
  void multiply(int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, int64_t stride) {
    for (int64_t k = 0; k < p_.d; k += kDepth) {
      const int64_t depth = std::min(kDepth, p_.d - k);
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < rows; ++r)
          tile({rows_.panel.data() + ((first_row + r) * p_.d + k) * width_,
                columns_.panel.data() + ((first_column + c) * p_.d + k) * width_, depth,
                lower_.data() + r * width_ * stride + c * width_, stride, k > 0,
                k + depth == p_.d ? columns_.bound.data() + (first_column + c) * width_ : nullptr});
    }
  }

  // Adds the columns of a chunk that may be among the k nearest of row i.
  void collect(int64_t i, int64_t base, int64_t size, float* lower, CandidateList& list) {
    if (p_.self && i >= base && i < base + size) lower[i - base] = std::numeric_limits<float>::infinity();
    if (list.size() == 0 && size > p_.k) list.start(lower, size, p_.k, gap(i), spread(), columns_.half.data() + base);
    list.append_below(lower, size, base);
    if (list.size() >= std::max<int64_t>(2 * p_.k, p_.k + 256))
      list.tighten(p_.k, gap(i), spread(), columns_.half.data());
  }

  // upper - lower of row i and column j is gap(i) + spread() h_j
  float gap(int64_t i) const {
    return static_cast<float>((2 * units_.epsilon * rows_.half[i] + 2 * units_.slack) * (1 + 0x1p-20));
  }
  float spread() const { return static_cast<float>(2 * units_.epsilon * (1 + 0x1p-20)); }

  void rank(int64_t i, CandidateList& list) {
    list.tighten(p_.k, gap(i), spread(), columns_.half.data());
    // only values that are not numbers can leave a row short; Python refuses them, and here nothing may be out of
    // bounds
    if (list.size() < p_.k) list.take_all(p_.m, p_.self ? i : -1);
    const int64_t size = list.size();
    row_.resize(p_.d);
    for (int64_t f = 0; f < p_.d; ++f) row_[f] = p_.x[i * p_.d + f] * rows_.scale[i];
    values_.resize(size);
    exact(Exact<T>{row_.data(), p_.y, columns_.scale.data(), p_.d, p_.metric == Metric::inner_product, list.indices(),
                   size, values_.data()});
    ranked_.resize(size);
    for (int64_t c = 0; c < size; ++c) {
      const T returned = finish<T>(p_.metric, values_[c]);
      ranked_[c] = {p_.metric == Metric::inner_product ? -returned : returned, list.indices()[c]};
    }
    sort_ranked(ranked_, scratch_);
    for (int64_t c = 0; c < p_.k; ++c) {
      p_.indices[i * p_.k + c] = ranked_[c].index;
      p_.distances[i * p_.k + c] = p_.metric == Metric::inner_product ? -ranked_[c].value : ranked_[c].value;
    }
  }

  const Problem<T>& p_;
  const Packed &rows_, &columns_;
  const Units& units_;
  const int64_t width_;
  std::vector<float> lower_;
  std::vector<CandidateList> candidates_;
  std::vector<double> row_, values_;
  std::vector<Ranked<T>> ranked_, scratch_;
};

template <class T>
Packed pack(const T* x, int64_t d, const Units& units, Metric metric, Packed scaled) {
  const int64_t width = panel_width();
  scaled.panels = (scaled.count + width - 1) / width;
  scaled.panel.resize(scaled.panels * d * width);
  scaled.half.resize(scaled.panels * width);
  scaled.bound.resize(scaled.panels * width);
  for (int64_t p = 0; p < scaled.panels; ++p) pack_panel(x, d, units, metric, width, p, scaled);
  return scaled;
}

template <class T>
struct Prepared {
  Problem<T> problem;
  Units units;
  Packed rows, columns;  // columns is empty when a set is searched in itself
  const Packed& database() const { return problem.self ? rows : columns; }
};

template <class T>
void prepare(Prepared<T>& set) {
  const Problem<T>& p = set.problem;
  find_scales(p.x, p.n, p.d, p.metric, set.rows);
  if (!p.self) find_scales(p.y, p.m, p.d, p.metric, set.columns);
  set.units = find_units(p.x, set.rows, p.y, p.self ? nullptr : &set.columns, p.d, p.metric);
  set.rows = pack(p.x, p.d, set.units, p.metric, std::move(set.rows));
  if (!p.self) set.columns = pack(p.y, p.d, set.units, p.metric, std::move(set.columns));
}

template <class T>
void search(std::vector<Prepared<T>>& sets) {
  parallel_tasks(static_cast<int64_t>(sets.size()), [&](int64_t b) { prepare(sets[b]); });
  const int64_t blocks = (sets[0].rows.panels + kRowPanels - 1) / kRowPanels;
  parallel_tasks(static_cast<int64_t>(sets.size()) * blocks, [&](int64_t task) {
    const Prepared<T>& set = sets[task / blocks];
    RowBlock<T>(set.problem, set.rows, set.database(), set.units).run(task % blocks * kRowPanels);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> knn_cpu(Tensor x, std::optional<Tensor> y, int64_t n_neighbors, std::string metric) {
  check_dim("x", x, 3);
  check_floating("x", x);
  check_contiguous("x", x);
  if (y) {
    check_like("y", *y, "x", x);
    check_dim("y", *y, 3);
    check_size("y", *y, 0, x.size(0));
    check_size("y", *y, 2, x.size(2));
    check_contiguous("y", *y);
  }
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), m = y ? y->size(1) : n;
  const int64_t most = y ? m : n - 1;
  LFM_CHECK(n_neighbors >= 1 && n_neighbors <= most, "n_neighbors must be between 1 and ", most, ", got ", n_neighbors);
  LFM_CHECK(m <= INT32_MAX, "a point set must have at most 2^31 - 1 points, got ", m);
  const Metric how = metric_of(metric);
  Tensor indices = torch::stable::new_empty(x, {batch, n, n_neighbors}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(x, {batch, n, n_neighbors});
  if (batch == 0 || n == 0) return {indices, distances};
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* queries = x.const_data_ptr<T>();
    const T* database = y ? y->const_data_ptr<T>() : queries;
    std::vector<Prepared<T>> sets(batch);
    for (int64_t b = 0; b < batch; ++b) {
      sets[b].problem = {queries + b * n * d,
                         database + b * m * d,
                         n,
                         m,
                         d,
                         n_neighbors,
                         how,
                         !y.has_value(),
                         indices.mutable_data_ptr<int64_t>() + b * n * n_neighbors,
                         distances.mutable_data_ptr<T>() + b * n * n_neighbors};
    }
    search(sets);
  });
  return {indices, distances};
}

}  // namespace lfm
