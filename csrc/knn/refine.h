// The second step of the filter of knn on the CPU after a first look: pairs that passed it are multiplied in 16 bits,
// one by one, and compared again, with the bounds of points.h. Without VNNI there is no first look.
#pragma once

#include <algorithm>
#include <cstdint>

#include "knn/filter.h"
#include "simd.h"

namespace lfm::knn {

// Pairs of a block of rows and a block of columns. Everything per row or column starts at its first one.
struct Refinement {
  const Features *rows, *columns;  // of `size` cache lines
  int64_t size;
  int32_t error;
  const float *row_unit, *row_lower, *row_limit;
  const float *column_unit, *column_lower, *column_limit;  // column_limit: null to look at the rows alone
  Hits seen;
  Hits row_hits, column_hits;  // appended to, with room for all that was seen and a vector more
};

#if LFM_X86_ASM
constexpr int kLinesTogether = 4;

// Products of one line with up to four.
template <int kLines>
LFM_TARGET_AVX512 inline void multiply_lines(const Features* row, const Features* const* columns, int64_t size,
                                             int32_t* out) {
  using I = simd::Vec<int32_t, 16>;
  I sum[kLinesTogether] = {};
  for (int64_t f = 0; f < size; ++f) {
    const I own = simd::load<I>(row + f);
#pragma GCC unroll 4
    for (int line = 0; line < kLines; ++line)
      add_products<64, Products::pairs_dot>(sum[line], own, simd::load<I>(columns[line] + f));
  }
  // lanes of four are added up across the vectors, then the four lanes of four
  const I first = LFM_SHUFFLE(sum[0], sum[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                  LFM_SHUFFLE(sum[0], sum[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const I second = LFM_SHUFFLE(sum[2], sum[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                   LFM_SHUFFLE(sum[2], sum[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const I all = LFM_SHUFFLE(first, second, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                LFM_SHUFFLE(first, second, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const I folded = all + LFM_SHUFFLE(all, all, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  const I sums = folded + LFM_SHUFFLE(folded, folded, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  std::memcpy(out, &sums, kLinesTogether * sizeof(int32_t));
}

LFM_INLINE void push(Hits& hits, int32_t where, float lower, bool wanted) {
  hits.where[hits.count] = where;
  hits.lower[hits.count] = lower;
  hits.count += wanted;
}

// What was seen comes row by row within a panel: a line is read once for up to four others.
LFM_TARGET_AVX512 inline void refine(Refinement& t) {
  const int32_t* where = t.seen.where;
  for (int64_t h = 0, count; h < t.seen.count; h += count) {
    const int64_t row = where[h] & 0xFFFF, most = std::min<int64_t>(kLinesTogether, t.seen.count - h);
    const Features* lines[kLinesTogether];
    for (count = 0; count < most && (where[h + count] & 0xFFFF) == row; ++count)
      lines[count] = t.columns + (where[h + count] >> 16) * t.size;
    const Features* own = t.rows + row * t.size;
    int32_t products[kLinesTogether];
    switch (count) {
      case 1:
        multiply_lines<1>(own, lines, t.size, products);
        break;
      case 2:
        multiply_lines<2>(own, lines, t.size, products);
        break;
      case 3:
        multiply_lines<3>(own, lines, t.size, products);
        break;
      default:
        multiply_lines<4>(own, lines, t.size, products);
    }
    const float lower = t.row_lower[row], unit = t.row_unit[row], limit = t.row_limit[row] - lower;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t column = where[h + c] >> 16;
      const float product = static_cast<float>(products[c] + t.error) * t.column_unit[column];
      const float value = t.column_lower[column] - unit * product, bound = value + lower;
      push(t.row_hits, where[h + c], bound, value <= limit);
      if (t.column_limit) push(t.column_hits, where[h + c], bound, value <= t.column_limit[column] - lower);
    }
  }
}
#else
inline void refine(Refinement&) {}  // there is no first look
#endif

}  // namespace lfm::knn
