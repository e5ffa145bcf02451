// The filter of knn on the CPU: integer products of a block of rows with a panel of columns, compared in the same place
// with the limits of the rows and, where a set is searched in itself, of the columns. Only what passes is written out.
// It takes the 16-bit integers of the points, or, for a first look at twice the rate, those of 8 bits. Both lie in
// lanes of 32 bits: two features, or four. The bounds are those of points.h: the integer sums fit 32 bits. Rows and
// columns of a block are fewer than 2^15, so that a pair of them is one integer.
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
  const int32_t *rows, *columns;  // panels, [depth][width]
  int64_t row_panels, depth;      // lanes of a point
  int32_t error;
  const int32_t* row_start;  // 8 bits: what the sums of each row start from, besides the error
  const float *row_unit, *row_lower, *row_limit;
  const float *column_unit, *column_lower, *column_limit;  // column_limit: null to look at the rows alone
  int64_t column_offset;                                   // of the panel within the block of columns
  int64_t diagonal;                      // row r and column r + diagonal of the panel are the same point
  const char *next_rows, *next_columns;  // 8 bits: fetched meanwhile, for what passes is multiplied next
  int64_t next_row_bytes, next_column_bytes;
  int32_t* sums;  // [rows][panel width], where the depth takes several slices
  // Appended to, with room for every pair and a vector more. A first look leaves all that passed either limit in
  // row_hits, without bounds.
  Hits row_hits, column_hits;
};

constexpr int64_t kSlice = 104;  // lanes multiplied at a time: their part of a panel stays in the first cache

enum class Products {
  pairs,      // of 16 bits, with the instructions of every machine
  pairs_dot,  // of 16 bits, multiplied and added up in one instruction (VNNI)
  quads_dot,  // of 8 bits, likewise
};

// sum += a b, added up over the features of each lane; with quads those of b are unsigned
template <int kBytes, Products kProducts, class I>
LFM_INLINE void add_products(I& sum, I a, I b) {
#if LFM_X86_ASM
  if constexpr (kProducts == Products::quads_dot) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
  } else if constexpr (kProducts == Products::pairs_dot) {
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

// Asks for one of so many shares of some bytes, in the second-level cache.
LFM_INLINE void prefetch_share(const char* data, int64_t bytes, int64_t share, int64_t shares) {
  const int64_t lines = bytes / 64;
  for (int64_t line = lines * share / shares; line < lines * (share + 1) / shares; ++line)
    __builtin_prefetch(data + line * 64, 0, 2);
}

template <int kBytes, Products kProducts>
LFM_INLINE void strip_body(Strip& t) {
  constexpr bool kQuads = kProducts == Products::quads_dot;
  constexpr int kLanes = simd::kLanes<float, kBytes>, kWidth = kPanelVectors * kLanes;
  constexpr int kRows = kBytes == 64 ? 8 : 4;
  using V = simd::Vec<float, kLanes>;
  using I = simd::Vec<int32_t, kLanes>;
  static_assert(kWidth % kRows == 0);
  I lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane << 16;
  I block[kRows * kPanelVectors];
  const int64_t rows = t.row_panels * kWidth, slices = (t.depth + kSlice - 1) / kSlice;
  for (int64_t step = 0; step < slices * rows; step += kRows) {
    const int64_t slice = step / rows, first = step % rows;
    const int64_t begin = t.depth * slice / slices, end = t.depth * (slice + 1) / slices;
    const int32_t* a = t.rows + (first / kWidth * t.depth + begin) * kWidth + first % kWidth;
    const int32_t* b = t.columns + begin * kWidth;
    int32_t* partial = t.sums + first * kWidth;
    if constexpr (kQuads) {
      prefetch_share(t.next_rows, t.next_row_bytes, step / kRows, slices * rows / kRows);
      prefetch_share(t.next_columns, t.next_column_bytes, step / kRows, slices * rows / kRows);
    }
    I acc[kRows][kPanelVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kPanelVectors; ++v) {
        if (slice > 0) {
          acc[r][v] = simd::load<I>(partial + r * kWidth + v * kLanes);
        } else {
          acc[r][v] = simd::broadcast<I>(kQuads ? t.error + t.row_start[first + r] : t.error);
        }
      }
    for (int64_t lane = begin; lane < end; ++lane, a += kWidth, b += kWidth) {
      I column[kPanelVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kPanelVectors; ++v) {
        column[v] = simd::load<I>(b + v * kLanes);
        if constexpr (kQuads) column[v] ^= simd::broadcast<I>(INT32_C(-0x7F7F7F80));  // + 128 in every byte
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const I row = simd::broadcast<I>(simd::load<int32_t>(a + r));
#pragma GCC unroll 3
        for (int v = 0; v < kPanelVectors; ++v) add_products<kBytes, kProducts>(acc[r][v], row, column[v]);
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
        const I where = lanes + static_cast<int32_t>(row + ((t.column_offset + lane0) << 16));
        if constexpr (kQuads) {
          Hits& hits = t.row_hits;
          hits.count += simd::store_lanes<kBytes>(where, row_bits | column_bits, hits.where + hits.count);
          continue;
        }
        const int64_t own = row + t.diagonal - lane0;
        if (own >= 0 && own < kLanes) row_bits &= ~(1u << own);
        const V bound = value + lower;
        add_hits<kBytes>(t.row_hits, row_bits, where, bound);
        if (t.column_limit) add_hits<kBytes>(t.column_hits, column_bits, where, bound);
      }
    }
  }
}

#if defined(__x86_64__)
LFM_TARGET_AVX512 inline void strip_first_look(Strip& t) { strip_body<64, Products::quads_dot>(t); }
LFM_TARGET_AVX512 inline void strip_dot(Strip& t) { strip_body<64, Products::pairs_dot>(t); }
LFM_TARGET_AVX512 inline void strip_avx512(Strip& t) { strip_body<64, Products::pairs>(t); }
LFM_TARGET_AVX2 inline void strip_avx2(Strip& t) { strip_body<32, Products::pairs>(t); }
#endif
inline void strip_generic(Strip& t) { strip_body<16, Products::pairs>(t); }

inline void filter_strip(Strip& t) {
#if defined(__x86_64__)
  if (t.row_start) return strip_first_look(t);
  switch (simd::level()) {
    case simd::Level::avx512:
      return simd::has_vnni() ? strip_dot(t) : strip_avx512(t);
    case simd::Level::avx2:
      return strip_avx2(t);
    default:
      break;
  }
#endif
  strip_generic(t);
}

}  // namespace lfm::knn
