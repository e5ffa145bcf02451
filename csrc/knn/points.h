// Points as the filter on the CPU sees them: shifted, scaled, and rounded to 16-bit integers in panels.
//
// A point x is shifted to a centre (not for inner products) and scaled to q, at most 1 in magnitude, then written as
// q = s (a + r): a are integers of at most 16 bits, |q / s| <= N, |r| <= R, where R is measured. Integer sums are exact
// in any order, so for all pairs, with one constant E,
//   | <q_i, q_j> - s_i s_j <a_i, a_j> | <= s_i s_j E,   E = 2 R N + R^2,   (N + R)^2 + E < 2^31.
// R grows as sqrt(d / 12): at d = 512 the bound is 3e-4 of |q_i| |q_j|, six times tighter than bfloat16 would allow at
// the same rate of arithmetic, and it needs no term for the order of summation.
//
// Filter values, with h = |q|^2 / 2 (0 for inner products), u = 2^-24, in float32:
//   lower_ij = g_i + g_j - s_i s_j (<a_i, a_j> + E),       g = h (1 - 32 u) - slack / 2,
//   upper_ij = lower_ij + 2 E s_i s_j + 64 u (h_i + h_j) + 2 slack
// bound |q_i - q_j|^2 / 2 (minus the product) on both sides, by margins that also keep apart any two distances that do
// not round to the same number in the output: rounding in the filter is below 22 u (h_i + h_j), since
// s_i s_j |<a_i, a_j>| <= 2.1 |q_i| |q_j|; for inner products E has 64 u N^2 in reserve instead. `slack` covers what is
// absolute: float64 rounding of the shift, results that are denormal, points dropped because they are far too small.
//
// A first look takes integers of 8 bits, made from those of 16: q = u (b + r), |b| at most 127, |q / u| at most a norm
// N' near that of most points at full range, and the same bounds with E' = R' (2 N' + R'). They are 30 times wider, but
// the products come at twice the rate; what passes is multiplied again in 16 bits, pair by pair (refine.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "checks.h"
#include "parallel.h"
#include "simd.h"

namespace lfm::knn {

enum class Metric { euclidean, cosine, angular, inner_product };

inline Metric metric_of(const std::string& metric) {
  if (metric == "euclidean") return Metric::euclidean;
  if (metric == "cosine") return Metric::cosine;
  if (metric == "angular") return Metric::angular;
  LFM_CHECK(metric == "inner_product", "metric must be one of 'euclidean', 'cosine', 'angular', 'inner_product', got '",
            metric, "'");
  return Metric::inner_product;
}

constexpr int kPanelVectors = 3;  // a panel is this many vector registers of points
constexpr int64_t kChunk = 512;   // points a task prepares

inline int64_t panel_width() {
  switch (simd::level()) {
    case simd::Level::avx512:
      return kPanelVectors * 16;
    case simd::Level::avx2:
      return kPanelVectors * 8;
    default:
      return kPanelVectors * 4;
  }
}

// A cache line of a point's integers of 16 bits.
struct alignas(64) Features {
  int16_t value[32];
};

// The integers of 8 bits.
struct FirstLook {
  int64_t quads = 0;           // fours of features, the last padded with 0
  std::vector<int32_t> panel;  // [panels][quads][width]
  std::vector<float> unit;     // u
  std::vector<int32_t> start;  // -128 sum b: the columns of a product count from 0 to 255
};

// One point set. Positions scatter the points, so that the first columns a row meets are a fair sample of all of them.
struct Points {
  int64_t count = 0, panels = 0, pairs = 0;  // pairs of features, the last padded with 0
  std::vector<int32_t> point;                // of each position
  std::vector<int32_t> panel;                // [panels][pairs][width]
  FirstLook look;                            // empty where the search takes none
  int64_t line_size = 0;                     // then also the 16-bit integers point by point, padded with 0
  std::vector<Features> lines;               // [count][line_size]
  std::vector<float> unit, lower;            // s and g at each position; g of padding is infinite and never passes
  std::vector<double> scale;                 // of each point: 1, or 1 / |x| for the angular metrics
  std::vector<double> square, largest;       // of each shifted point: |q|^2 and max |q|, before the common factor

  const Features* line(int64_t position) const { return lines.data() + position * line_size; }
  int64_t packed_bytes() const {
    return static_cast<int64_t>((panel.size() + look.panel.size()) * sizeof(int32_t) + lines.size() * sizeof(Features));
  }
};

// What the points of one search have in common.
struct Units {
  std::vector<double> centre;
  double row = 1, column = 1;  // powers of two that bring the largest magnitude to at most 1
  double slack = 0;
  double integer_norm = 0;  // N
  int32_t error = 0;        // E
  double look_norm = 0;     // N', 0 where there is no first look
  int32_t look_error = 0;   // E'
  bool filterable = true;   // false where the slack would swallow every distance: then all pairs are evaluated
};

template <class Body>
void over_chunks(int64_t count, const Body& body) {
  parallel_tasks((count + kChunk - 1) / kChunk,
                 [&](int64_t task) { body(task * kChunk, std::min(count, (task + 1) * kChunk)); });
}

// 1 / |x| of every point, without overflow.
template <class T>
void find_scales(const T* x, int64_t d, Metric metric, Points& out) {
  out.scale.assign(out.count, 1.0);
  if (metric != Metric::angular && metric != Metric::cosine) return;
  over_chunks(out.count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      double sum = 0, largest = 0;
      for (int64_t c = 0; c < d; ++c) largest = std::max(largest, std::abs(static_cast<double>(x[i * d + c])));
      if (largest == 0) continue;  // refused by Python; as an operator, a zero row is the zero vector
      for (int64_t c = 0; c < d; ++c) {
        const double v = x[i * d + c] / largest;
        sum += v * v;
      }
      out.scale[i] = 1 / largest / std::sqrt(sum);
    }
  });
}

// Mean of a sample of the points. Any centre is right; one in the middle makes the bounds tight.
template <class T>
void find_centre(const T* x, int64_t d, const Points& points, std::vector<double>& centre) {
  constexpr int64_t kSamples = 1024;
  const int64_t samples = std::min(points.count, kSamples);
  for (int64_t s = 0; s < samples; ++s) {
    const int64_t i = s * points.count / samples;
    const double weight = points.scale[i] / static_cast<double>(samples);
    for (int64_t c = 0; c < d; ++c) centre[c] += x[i * d + c] * weight;
  }
}

template <class T>
struct Shifted {  // |q|^2, max |q| and max |x| of one point
  const T* x;
  const double* centre;
  double scale;
  int64_t d;
  double square, largest, magnitude;
};

template <int kBytes, class T>
LFM_INLINE void measure_body(Shifted<T>& p) {
  constexpr int kLanes = simd::kLanes<double, kBytes>;
  using V = simd::Vec<double, kLanes>;
  using In = simd::Vec<T, kLanes>;
  V square = {}, largest = {}, magnitude = {};
  int64_t c = 0;
  for (; c + kLanes <= p.d; c += kLanes) {
    const V value = simd::widened<V>(simd::load<In>(p.x + c)) * p.scale;
    const V q = value - simd::load<V>(p.centre + c), size = value < 0 ? -value : value, reach = q < 0 ? -q : q;
    square += q * q;
    magnitude = size > magnitude ? size : magnitude;
    largest = reach > largest ? reach : largest;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    p.square += square[lane];
    p.magnitude = std::max(p.magnitude, magnitude[lane]);
    p.largest = std::max(p.largest, largest[lane]);
  }
  for (; c < p.d; ++c) {
    const double value = p.x[c] * p.scale, q = value - p.centre[c];
    p.square += q * q;
    p.magnitude = std::max(p.magnitude, std::abs(value));
    p.largest = std::max(p.largest, std::abs(q));
  }
}
LFM_SIMD_DISPATCH(template <class T>, void, measure, (Shifted<T> & p), (p))

struct Extent {
  double largest = 0, magnitude = 0;
};

template <class T>
Extent measure_points(const T* x, int64_t d, const std::vector<double>& centre, Points& out) {
  out.square.resize(out.count);
  out.largest.resize(out.count);
  std::vector<Extent> parts((out.count + kChunk - 1) / kChunk);
  over_chunks(out.count, [&](int64_t first, int64_t last) {
    Extent& part = parts[first / kChunk];
    for (int64_t i = first; i < last; ++i) {
      Shifted<T> p{x + i * d, centre.data(), out.scale[i], d, 0, 0, 0};
      measure(p);
      out.square[i] = p.square;
      out.largest[i] = p.largest;
      part.largest = std::max(part.largest, p.largest);
      part.magnitude = std::max(part.magnitude, p.magnitude);
    }
  });
  Extent whole;
  for (const Extent& part : parts) {
    whole.largest = std::max(whole.largest, part.largest);
    whole.magnitude = std::max(whole.magnitude, part.magnitude);
  }
  return whole;
}

inline double factor_of(double largest) {
  int exponent = 0;
  if (largest > 0 && std::isfinite(largest)) std::frexp(largest, &exponent);
  return std::ldexp(1.0, std::min(1000, -exponent));  // 2^-exponent itself may overflow
}

template <class T>
void set_units(Metric metric, int64_t d, Extent rows, Extent columns, Units& units) {
  const double features = static_cast<double>(d), root = std::sqrt(features);
  const bool product = metric == Metric::inner_product;
  if (!product) rows.largest = columns.largest = std::max(rows.largest, columns.largest);
  units.row = factor_of(rows.largest);
  units.column = factor_of(columns.largest);
  const double squares = units.row * units.column;
  const double denormal = static_cast<double>(std::numeric_limits<T>::denorm_min());
  const double largest_result = static_cast<double>(std::numeric_limits<T>::max());
  units.slack = features * (0x1p-100 + 4 * std::numeric_limits<double>::denorm_min() * squares);
  if (product || metric == Metric::cosine) {
    units.slack += denormal * squares;
  } else {
    units.slack += denormal * units.row * (2 * root + denormal * units.row);
  }
  if (!product) {  // float64 rounding of the shift
    const double rounding = 0x1p-52 * (std::max(rows.magnitude, columns.magnitude) + rows.largest) * units.row;
    units.slack += 4 * root * rounding * (root + root * rounding);
  }
  // where a result, or a float64 square on the way to it, may be infinite, the indices alone decide
  const double reach = 4 * features * rows.largest * columns.largest;
  const bool overflows = !(reach < 0.25 * std::numeric_limits<double>::max()) ||
                         !((product ? reach : std::sqrt(reach)) < 0.25 * largest_result);
  units.filterable = !overflows && units.slack < 0x1p-20;
  units.integer_norm = std::floor(46340 - 1.5 * root - 8);  // 46340^2 < 2^31; a residual is at most sqrt(d) / 2
}

template <class T>
struct Quantize {
  const T* x;
  const double* centre;
  double scale, factor;  // factor: the common one over s
  int64_t d;
  int16_t* out;
  double residual;  // |r|^2
};

template <int kBytes, class T>
LFM_INLINE void quantize_body(Quantize<T>& p) {
  constexpr int kLanes = simd::kLanes<double, kBytes>;
  using V = simd::Vec<double, kLanes>;
  using In = simd::Vec<T, kLanes>;
  using Out = simd::Vec<int16_t, kLanes>;
  constexpr double kMagic = 0x1.8p52;  // adding it rounds to an integer
  V residual = {};
  int64_t c = 0;
  for (; c + kLanes <= p.d; c += kLanes) {
    const V value = simd::widened<V>(simd::load<In>(p.x + c)) * p.scale;
    const V q = (value - simd::load<V>(p.centre + c)) * p.factor;
    const V whole = simd::rounded(q + kMagic) - kMagic;
    residual += (q - whole) * (q - whole);
    simd::store(p.out + c, __builtin_convertvector(__builtin_convertvector(whole, simd::Vec<int32_t, kLanes>), Out));
  }
  for (int lane = 0; lane < kLanes; ++lane) p.residual += residual[lane];
  for (; c < p.d; ++c) {
    const double q = (p.x[c] * p.scale - p.centre[c]) * p.factor, whole = std::nearbyint(q);
    p.residual += (q - whole) * (q - whole);
    p.out[c] = static_cast<int16_t>(whole);
  }
}
LFM_SIMD_DISPATCH(template <class T>, void, quantize, (Quantize<T> & p), (p))

struct Coarsen {
  const int16_t* from;
  int64_t size;
  float factor;  // s / u
  int8_t* to;
  float residual;  // |s a / u - b|^2
  int32_t sum;     // of b
};

template <int kBytes>
LFM_INLINE void coarsen_body(Coarsen& p) {
  constexpr int kLanes = simd::kLanes<float, kBytes>;
  using V = simd::Vec<float, kLanes>;
  using In = simd::Vec<int16_t, kLanes>;
  using I = simd::Vec<int32_t, kLanes>;
  using Out = simd::Vec<int8_t, kLanes>;
  constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer
  V residual = {};
  I sum = {};
  int64_t c = 0;
  for (; c + kLanes <= p.size; c += kLanes) {
    const V q = __builtin_convertvector(simd::load<In>(p.from + c), V) * p.factor;
    const V whole = simd::rounded(q + kMagic) - kMagic;
    const I b = __builtin_convertvector(whole, I);
    residual += (q - whole) * (q - whole);
    sum += b;
    simd::store(p.to + c, __builtin_convertvector(b, Out));
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    p.residual += residual[lane];
    p.sum += sum[lane];
  }
  for (; c < p.size; ++c) {
    const float q = p.from[c] * p.factor, whole = std::nearbyint(q);
    p.residual += (q - whole) * (q - whole);
    p.sum += static_cast<int32_t>(whole);
    p.to[c] = static_cast<int8_t>(whole);
  }
}
LFM_SIMD_DISPATCH(, inline void, coarsen, (Coarsen & p), (p))

// Residuals |r| and |r'|, at most.
struct Residuals {
  double fine = 0, look = 0;
  void include(const Residuals& other) {
    fine = std::max(fine, other.fine);
    look = std::max(look, other.look);
  }
};

// Fills panels with the integers of the points.
template <class T>
class PanelFiller {
 public:
  PanelFiller(const T* x, int64_t d, const Units& units, double factor, Metric metric, Points& out)
      : x_(x), d_(d), units_(units), factor_(factor), metric_(metric), out_(out) {}

  Residuals fill() {
    const int64_t width = panel_width(), padded = out_.panels * width;
    out_.panel.resize(padded * out_.pairs);
    out_.unit.resize(padded);
    out_.lower.resize(padded);
    if (units_.look_norm > 0) {
      out_.line_size = (d_ + 31) / 32;
      out_.lines.resize(out_.count * out_.line_size);
      out_.look.quads = (d_ + 3) / 4;
      out_.look.panel.resize(padded * out_.look.quads);
      out_.look.unit.assign(padded, 0.0f);
      out_.look.start.assign(padded, 0);
    }
    std::vector<Residuals> worst(out_.panels);
    parallel_tasks(out_.panels, [&](int64_t p) {
      std::vector<int16_t> row((d_ + 31) / 32 * 32);
      std::vector<int8_t> look(row.size());
      for (int64_t lane = 0; lane < width; ++lane) {
        std::fill(row.begin(), row.end(), int16_t{0});
        std::fill(look.begin(), look.end(), int8_t{0});
        fill_point(p * width + lane, row, look, worst[p]);
        scatter_lanes(row.data(), out_.pairs, out_.panel.data() + p * out_.pairs * width + lane, width);
        if (units_.look_norm > 0)
          scatter_lanes(look.data(), out_.look.quads, out_.look.panel.data() + p * out_.look.quads * width + lane,
                        width);
      }
    });
    Residuals all;
    for (const Residuals& one : worst) all.include(one);
    return all;
  }

 private:
  template <class Integer>
  static void scatter_lanes(const Integer* from, int64_t depth, int32_t* to, int64_t width) {
    for (int64_t c = 0; c < depth; ++c)
      std::memcpy(to + c * width, from + c * (sizeof(int32_t) / sizeof(Integer)), sizeof(int32_t));
  }

  void fill_point(int64_t position, std::vector<int16_t>& row, std::vector<int8_t>& look, Residuals& worst) {
    out_.unit[position] = 0;
    out_.lower[position] = std::numeric_limits<float>::infinity();
    if (position >= out_.count) return;
    const int64_t i = out_.point[position];
    const double half = out_.square[i] * factor_ * factor_ / 2, reach = out_.largest[i] * factor_;
    const double norm = std::sqrt(2 * half), wanted = std::max(norm / units_.integer_norm, reach / 32767);
    out_.lower[position] =
        static_cast<float>(half * (metric_ == Metric::inner_product ? 0 : 1 - 0x1p-19) - units_.slack / 2);
    if (wanted >= 0x1p-120 && std::isfinite(wanted)) {
      const auto unit = static_cast<float>(wanted * (1 + 0x1p-22));
      out_.unit[position] = unit;
      Quantize<T> q{x_ + i * d_, units_.centre.data(), out_.scale[i], factor_ / unit, d_, row.data(), 0};
      quantize(q);
      worst.fine = std::max(worst.fine, std::sqrt(q.residual));
      if (units_.look_norm > 0) {
        const double coarse = std::max(norm / units_.look_norm, reach / 127);
        look_at(position, static_cast<float>(coarse * (1 + 0x1p-22)), std::sqrt(q.residual), row, look, worst);
      }
    }
    if (units_.look_norm > 0)
      std::memcpy(&out_.lines[position * out_.line_size], row.data(), row.size() * sizeof(int16_t));
  }

  void look_at(int64_t position, float unit, double residual, const std::vector<int16_t>& row,
               std::vector<int8_t>& look, Residuals& worst) {
    const float ratio = out_.unit[position] / unit;
    Coarsen c{row.data(), d_, ratio, look.data(), 0, 0};
    coarsen(c);
    out_.look.unit[position] = unit;
    out_.look.start[position] = -128 * c.sum;
    // float32 rounding of the terms, of their sum, and of each product with the ratio
    const double rounding = std::sqrt(static_cast<double>(d_)) * 0x1p-15;
    worst.look =
        std::max(worst.look, std::sqrt(static_cast<double>(c.residual)) * (1 + 0x1p-9) + rounding + residual * ratio);
  }

  const T* x_;
  const int64_t d_;
  const Units& units_;
  const double factor_;
  const Metric metric_;
  Points& out_;
};

// N': the norm of the points in units of their largest feature over 127, on average.
inline double mean_look_norm(const Points& points) {
  double sum = 0;
  for (int64_t i = 0; i < points.count; ++i)
    sum += points.largest[i] > 0 ? 127 * std::sqrt(points.square[i]) / points.largest[i] : 127;
  return sum / static_cast<double>(points.count);
}

// A step near the golden ratio, prime to the count: any run of positions is spread evenly over the points.
inline void scatter(Points& points) {
  const int64_t n = points.count;
  int64_t step = std::max<int64_t>(1, static_cast<int64_t>(0.6180339887498949 * static_cast<double>(n)));
  while (std::gcd(step, n) != 1) ++step;
  points.point.resize(n);
  for (int64_t position = 0, point = 0; position < n; ++position, point = (point + step) % n)
    points.point[position] = static_cast<int32_t>(point);
}

inline void set_size(Points& points, int64_t count, int64_t d) {
  const int64_t width = panel_width();
  points.count = count;
  points.panels = (count + width - 1) / width;
  points.pairs = (d + 1) / 2;
  scatter(points);
}

// Prepares a search of x in y, or in itself where y is null.
template <class T>
void prepare(const T* x, int64_t n, const T* y, int64_t m, int64_t d, Metric metric, bool first_look, Points& rows,
             Points& columns, Units& units) {
  units.centre.assign(d, 0.0);
  set_size(rows, n, d);
  find_scales(x, d, metric, rows);
  if (y) {
    set_size(columns, m, d);
    find_scales(y, d, metric, columns);
  }
  if (metric != Metric::inner_product) find_centre(y ? y : x, d, y ? columns : rows, units.centre);
  const Extent row_extent = measure_points(x, d, units.centre, rows);
  const Extent column_extent = y ? measure_points(y, d, units.centre, columns) : row_extent;
  set_units<T>(metric, d, row_extent, column_extent, units);
  if (!units.filterable) return;
  if (first_look) units.look_norm = mean_look_norm(y ? columns : rows);
  Residuals residuals = PanelFiller<T>(x, d, units, units.row, metric, rows).fill();
  if (y) residuals.include(PanelFiller<T>(y, d, units, units.column, metric, columns).fill());
  const double norm = units.integer_norm, bound = residuals.fine * (1 + 0x1p-20) + 0x1p-20;
  units.error = static_cast<int32_t>(std::ceil(bound * (2 * norm + bound) + 0x1p-18 * norm * norm)) + 1;
  // a point of few large features has less than N': the share of E' is for the rounding of its products
  const double look = units.look_norm, wide = residuals.look * (2 * look + residuals.look);
  units.look_error = static_cast<int32_t>(std::ceil(wide * (1 + 0x1p-16) + 0x1p-18 * look * look)) + 1;
}

}  // namespace lfm::knn
