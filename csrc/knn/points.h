// Points as the filter on the CPU sees them: shifted, scaled, and rounded to 16-bit integers in panels. prepare.h
// makes them, for knn (lfm_torch/ops/knn.py).
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

#include <cstdint>
#include <vector>

#include "simd.h"

namespace lfm::knn {

constexpr int kPanelVectors = 3;  // a panel is this many vector registers of points

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

}  // namespace lfm::knn
