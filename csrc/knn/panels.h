// Second half of the preparation of knn on the CPU: the points rounded to integers of 16 bits, those to integers of 8,
// and both written to panels. The residuals |r| and |r'| of every point are measured: E and E' of points.h rest on the
// largest of them. A task fills a panel of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "knn/knn.h"
#include "knn/points.h"
#include "parallel.h"
#include "simd.h"

namespace lfm::knn {

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

}  // namespace lfm::knn
