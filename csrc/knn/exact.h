// The exact values of knn on the CPU: float64 differences or products of the original points, whose sums have one order
// on every machine, that of rank.cuh on the GPU. Within float64 rounding of the values of `knn_reference`. Points are
// read at 64-bit offsets, row and column being those of a valid pair.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "knn/knn.h"
#include "simd.h"

namespace lfm::knn {

struct Pair {
  int32_t row, column;  // points
};

// Values of pairs, in float64: squared distances of the scaled points, or minus the inner products, so that smaller is
// nearer.
template <class T>
struct Exact {
  const T *x, *y;
  const double *row_scale, *column_scale;  // null: 1
  int64_t d;
  bool product;
  const Pair* pairs;
  int64_t count;
  double* out;
};

constexpr int kTogether = 4;  // pairs of a row evaluated at a time, so that their sums do not wait for one another

template <int kBytes, bool kScaled, bool kProduct, int kPairs, class T>
LFM_INLINE void exact_group(const Exact<T>& e, int64_t p) {
  // eight float64 lanes on every machine, so that the order of summation is the same everywhere
  constexpr int kLanes = simd::kLanes<double, kBytes>, kVectors = 8 / kLanes;
  using V = simd::Vec<double, kLanes>;
  using In = simd::Vec<T, kLanes>;
  const T *own = e.x + e.pairs[p].row * e.d, *other[kPairs];
  const double own_scale = kScaled ? e.row_scale[e.pairs[p].row] : 1;
  double other_scale[kPairs], total[kPairs] = {};
  V sum[kPairs][kVectors] = {};
  for (int q = 0; q < kPairs; ++q) {
    other[q] = e.y + e.pairs[p + q].column * e.d;
    other_scale[q] = kScaled ? e.column_scale[e.pairs[p + q].column] : 1;
  }
  for (int q = 0; q < kPairs; ++q) {  // the next ones lie anywhere: ask for them before they are needed
    const Pair& pair = e.pairs[std::min(p + kPairs + q, e.count - 1)];
    const char* next = reinterpret_cast<const char*>(e.y + pair.column * e.d);
    for (int64_t byte = 0; byte < std::min<int64_t>(e.d * sizeof(T), 512); byte += 64) __builtin_prefetch(next + byte);
  }
  int64_t f = 0;
  for (; f + 8 <= e.d; f += 8)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V a = simd::widened<V>(simd::load<In>(own + f + v * kLanes));
      if (kScaled) a = simd::rounded(a * own_scale);
#pragma GCC unroll 4
      for (int q = 0; q < kPairs; ++q) {
        V b = simd::widened<V>(simd::load<In>(other[q] + f + v * kLanes));
        if (kScaled) b = simd::rounded(b * other_scale[q]);
        if constexpr (kProduct) {
          sum[q][v] += a * b;
        } else {
          sum[q][v] += (a - b) * (a - b);
        }
      }
    }
  for (; f < e.d; ++f) {
    const double a = simd::rounded(static_cast<double>(own[f]) * own_scale);
    for (int q = 0; q < kPairs; ++q) {
      const double b = simd::rounded(static_cast<double>(other[q][f]) * other_scale[q]);
      total[q] += kProduct ? a * b : (a - b) * (a - b);
    }
  }
  for (int q = 0; q < kPairs; ++q) {
    for (int v = 0; v < kVectors; ++v)
      for (int lane = 0; lane < kLanes; ++lane) total[q] += sum[q][v][lane];
    e.out[p + q] = kProduct ? -total[q] : total[q];
  }
}

// Pairs come row by row: a row is read once for up to four of them.
template <int kBytes, bool kScaled, bool kProduct, class T>
LFM_INLINE void exact_loop(const Exact<T>& e) {
  for (int64_t p = 0, count; p < e.count; p += count) {
    const int64_t most = std::min<int64_t>(kTogether, e.count - p);
    for (count = 1; count < most && e.pairs[p + count].row == e.pairs[p].row;) ++count;
    switch (count) {
      case 1:
        exact_group<kBytes, kScaled, kProduct, 1>(e, p);
        break;
      case 2:
        exact_group<kBytes, kScaled, kProduct, 2>(e, p);
        break;
      case 3:
        exact_group<kBytes, kScaled, kProduct, 3>(e, p);
        break;
      default:
        exact_group<kBytes, kScaled, kProduct, kTogether>(e, p);
    }
  }
}

template <int kBytes, class T>
LFM_INLINE void exact_body(const Exact<T>& e) {
  if (e.product) return exact_loop<kBytes, false, true>(e);
  e.row_scale ? exact_loop<kBytes, true, false>(e) : exact_loop<kBytes, false, false>(e);
}

LFM_SIMD_DISPATCH(template <class T>, void, exact, (const Exact<T>& e), (e))

// The value of a pair that rows are sorted by, rounded as it is returned; inner products are negated.
template <class T>
T sort_value(Metric metric, double value) {
  switch (metric) {
    case Metric::inner_product:
      return static_cast<T>(value);
    case Metric::cosine:
      return static_cast<T>(value / 2);
    default:
      return static_cast<T>(std::sqrt(value));
  }
}

}  // namespace lfm::knn
