// The filter: integer products of a block of rows with a panel of columns, compared in the same place with the limits
// of the rows and, where a set is searched in itself, of the columns. Only what passes is written out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "knn/points.h"

namespace lfm::knn {

// Pairs whose lower bound passed a limit.
struct Hits {
  int32_t* where;  // row + column * 2^16, both counted within their blocks
  float* lower;
  int64_t count;
};

// One block of rows against one panel of columns. Everything per row or column starts at its first one.
struct Strip {
  const int16_t *rows, *columns;  // panels
  int64_t row_panels, pairs;
  int32_t error;
  const float *row_unit, *row_lower, *row_limit;
  const float *column_unit, *column_lower, *column_limit;  // column_limit: null to look at the rows alone
  int64_t column_offset;                                   // of the panel within the block of columns
  int64_t diagonal;            // row r and column r + diagonal of the panel are the same point
  int32_t* sums;               // [rows][panel width], where the depth takes several slices
  Hits row_hits, column_hits;  // appended to, with room for every pair and a vector more
};

constexpr int64_t kSlice =
    104;  // pairs of features multiplied at a time: their part of a panel stays in the first cache

// sum += a b, added up in pairs of neighbouring 16-bit lanes
template <int kBytes, bool kVnni, class I>
LFM_INLINE void add_pairs(I& sum, I a, I b) {
#if defined(__x86_64__)
  if constexpr (kVnni) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  } else if constexpr (kBytes > 16) {
    I product;
    asm("vpmaddwd %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
    sum += product;
  } else {
    asm("pmaddwd %1, %0" : "+x"(a) : "x"(b));
    sum += a;
  }
#else
  sum += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

template <int kBytes, class I, class V>
LFM_INLINE void add_hits(Hits& hits, unsigned bits, I where, V lower) {
  simd::store_lanes<kBytes>(where, bits, hits.where + hits.count);
  hits.count += simd::store_lanes<kBytes>(lower, bits, hits.lower + hits.count);
}

template <int kBytes, bool kVnni>
LFM_INLINE void strip_body(Strip& t) {
  constexpr int kLanes = simd::kLanes<float, kBytes>, kWidth = kPanelVectors * kLanes;
  constexpr int kRows = kBytes == 64 ? 8 : 4;
  using V = simd::Vec<float, kLanes>;
  using I = simd::Vec<int32_t, kLanes>;
  static_assert(kWidth % kRows == 0);
  I lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane << 16;
  I block[kRows * kPanelVectors];
  const int64_t rows = t.row_panels * kWidth, slices = (t.pairs + kSlice - 1) / kSlice;
  for (int64_t step = 0; step < slices * rows; step += kRows) {
    const int64_t slice = step / rows, first = step % rows;
    const int64_t begin = t.pairs * slice / slices, end = t.pairs * (slice + 1) / slices;
    const int16_t* a = t.rows + ((first / kWidth * t.pairs + begin) * kWidth + first % kWidth) * 2;
    const int16_t* b = t.columns + begin * kWidth * 2;
    int32_t* partial = t.sums + first * kWidth;
    I acc[kRows][kPanelVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kPanelVectors; ++v)
        acc[r][v] = slice == 0 ? simd::broadcast<I>(t.error) : simd::load<I>(partial + r * kWidth + v * kLanes);
    for (int64_t pair = begin; pair < end; ++pair, a += 2 * kWidth, b += 2 * kWidth) {
      I column[kPanelVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kPanelVectors; ++v) column[v] = simd::load<I>(b + 2 * v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t both;
        std::memcpy(&both, a + 2 * r, sizeof(both));
        const I row = simd::broadcast<I>(both);
#pragma GCC unroll 3
        for (int v = 0; v < kPanelVectors; ++v) add_pairs<kBytes, kVnni>(acc[r][v], row, column[v]);
      }
    }
    if (slice + 1 < slices) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < kPanelVectors; ++v) simd::store(partial + r * kWidth + v * kLanes, acc[r][v]);
      continue;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kPanelVectors; ++v) block[r * kPanelVectors + v] = acc[r][v];

    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      const float lower = t.row_lower[row];
      const V unit = simd::broadcast<V>(t.row_unit[row]), limit = simd::broadcast<V>(t.row_limit[row] - lower);
      for (int v = 0; v < kPanelVectors; ++v) {
        const int lane0 = v * kLanes;
        const V product =
            __builtin_convertvector(block[r * kPanelVectors + v], V) * simd::load<V>(t.column_unit + lane0);
        const V value = simd::load<V>(t.column_lower + lane0) - unit * product;
        unsigned row_bits = simd::lanes_not_above<kBytes>(value, limit), column_bits = 0;
        if (t.column_limit) {
          const V theirs = simd::load<V>(t.column_limit + lane0) - simd::broadcast<V>(lower);
          column_bits = simd::lanes_not_above<kBytes>(value, theirs);
        }
        if ((row_bits | column_bits) == 0) continue;
        const int64_t own = row + t.diagonal - lane0;
        if (own >= 0 && own < kLanes) row_bits &= ~(1u << own);
        const V bound = value + lower;
        const I where = lanes + static_cast<int32_t>(row + ((t.column_offset + lane0) << 16));
        add_hits<kBytes>(t.row_hits, row_bits, where, bound);
        if (t.column_limit) add_hits<kBytes>(t.column_hits, column_bits, where, bound);
      }
    }
  }
}

#if defined(__x86_64__)
LFM_TARGET_AVX512 inline void strip_vnni(Strip& t) { strip_body<64, true>(t); }
LFM_TARGET_AVX512 inline void strip_avx512(Strip& t) { strip_body<64, false>(t); }
LFM_TARGET_AVX2 inline void strip_avx2(Strip& t) { strip_body<32, false>(t); }
#endif
inline void strip_generic(Strip& t) { strip_body<16, false>(t); }

inline void filter_strip(Strip& t) {
#if defined(__x86_64__)
  switch (simd::level()) {
    case simd::Level::avx512:
      return simd::has_vnni() ? strip_vnni(t) : strip_avx512(t);
    case simd::Level::avx2:
      return strip_avx2(t);
    default:
      break;
  }
#endif
  strip_generic(t);
}

}  // namespace lfm::knn
