// First half of the preparation of knn on the CPU, linear in the input and in float64: unit rows for the angular
// metrics, a centre, the extents of the shifted points, and the units that follow from them. They keep the promises of
// points.h: |q| is at most 1 in every feature, N leaves room for (N + R)^2 + E < 2^31 with R <= sqrt(d) / 2, and
// `slack` is above what the shift and denormal results may err by; where a result, or a square on the way to it, may
// overflow, nothing is filtered.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "knn/knn.h"
#include "knn/points.h"
#include "parallel.h"
#include "simd.h"

namespace lfm::knn {

constexpr int64_t kChunk = 512;  // points a task prepares

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

}  // namespace lfm::knn
