// inner_products: x y^T, where every entry depends on its two rows alone and not on what they are stacked with, as no
// BLAS promises. A comparison may then multiply any pairs together and store what it finds by pair.
// Within rounding of `inner_products_reference`, which is such a BLAS. Rows are packed so that a register holds the
// same term of as many rows of y; sums of kDepthBytes of terms are taken in registers, one term after the other, and
// added up in order. Edges are filled with zero rows, not summed otherwise. A task writes a chunk of its own.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "maps/maps.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace lfm {
namespace {

// One packed panel of x stays in the first-level cache, a chunk of y in the second.
constexpr int64_t kDepthBytes = 1024;
constexpr int64_t kChunkRows = 504, kChunkColumns = 512;
// Rows of x that are summed at once: 12, or 6 where there are 16 registers; fewer at the end. Columns: two registers.
constexpr int64_t kPanelRows = 12, kPanelColumns = 32;
template <int kBytes>
inline constexpr int kMostRows = kBytes == 64 ? kPanelRows : kPanelRows / 2;
constexpr int kFewRows = 2;

template <class T>
struct Products {
  int64_t n, x_rows, y_rows;
  const T *x, *y;
  T* out;
};

// v[i][j] and v[j][i] change places: blocks of 1, 2, 4, ... lanes are exchanged between rows so far apart.
template <class V, int kBlock, size_t... kLane>
LFM_INLINE void exchange(V& a, V& b, std::index_sequence<kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  V upper = a, lower = b;
  a = LFM_SHUFFLE(upper, lower, ((kLane & kBlock) ? kLanes + kLane - kBlock : kLane)...);
  b = LFM_SHUFFLE(upper, lower, ((kLane & kBlock) ? kLanes + kLane : kLane + kBlock)...);
}

template <int kBlock, class V, int kLanes>
LFM_INLINE void transpose(V (&v)[kLanes]) {
  if constexpr (kBlock < kLanes) {
    for (int i = 0; i < kLanes; ++i)
      if (!(i & kBlock)) exchange<V, kBlock>(v[i], v[i + kBlock], std::make_index_sequence<kLanes>());
    transpose<2 * kBlock>(v);
  }
}

// Term k of `rows` rows from `first` on to packed[k * width], zeros up to the width.
template <int kBytes, class T>
LFM_INLINE void pack(const T* matrix, int64_t n, int64_t rows, int64_t depth, int64_t width, T* packed) {
  // moved as integers: the compilers' shuffles take indices of the type they move
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr int kLanes = simd::kLanes<T, kBytes>;
  using V = simd::Vec<Bits, kLanes>;
  for (int64_t row = 0; row < width; row += kLanes) {
    const int64_t taken = std::min<int64_t>(kLanes, width - row), present = std::min<int64_t>(taken, rows - row);
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      V block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = i < present ? simd::load<V>(matrix + (row + i) * n + k) : V{};
      transpose<1>(block);
      T* out = packed + k * width + row;
      if (taken == kLanes) {
        for (int i = 0; i < kLanes; ++i) simd::store(out + i * width, block[i]);
      } else {
        for (int i = 0; i < kLanes; ++i) std::memcpy(out + i * width, &block[i], taken * sizeof(T));
      }
    }
    for (; k < depth; ++k)
      for (int64_t i = 0; i < taken; ++i) packed[k * width + row + i] = i < present ? matrix[(row + i) * n + k] : T{0};
  }
}

// A block of kRows x (kVectors vectors), of which `rows` and `columns` exist, added to what the terms before gave.
template <int kRows, int kVectors, class V, class T>
LFM_INLINE void multiply(const T* x, const T* y, int64_t depth, int64_t rows, int64_t columns, bool begins, T* out,
                         int64_t ld) {
  constexpr int kLanes = sizeof(V) / sizeof(T), kWidth = kVectors * kLanes;
  V sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = simd::load<V>(y + k * kWidth + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const T left = x[k * kRows + r];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    if (columns == kWidth) {
      for (int v = 0; v < kVectors; ++v) {
        T* place = out + r * ld + v * kLanes;
        simd::store(place, begins ? sums[r][v] : simd::load<V>(place) + sums[r][v]);
      }
      continue;
    }
    T lanes[kWidth];
    std::memcpy(lanes, sums[r], sizeof(lanes));
    for (int64_t c = 0; c < columns; ++c) out[r * ld + c] = begins ? lanes[c] : out[r * ld + c] + lanes[c];
  }
}

// Panels of x as wide as the registers allow, then narrower ones, so that few zero rows are multiplied.
template <int kBytes>
LFM_INLINE int64_t panel_rows(int64_t left) {
  return left >= kMostRows<kBytes> ? kMostRows<kBytes> : (left + kFewRows - 1) / kFewRows * kFewRows;
}

template <int kVectors, int kRows, class V, class T>
LFM_INLINE void panel(int64_t rows, const T* x, const T* y, int64_t depth, int64_t left, int64_t columns, bool begins,
                      T* out, int64_t ld) {
  if (rows == kRows) return multiply<kRows, kVectors, V>(x, y, depth, left, columns, begins, out, ld);
  if constexpr (kRows > kFewRows)
    panel<kVectors, kRows - kFewRows, V>(rows, x, y, depth, left, columns, begins, out, ld);
}

template <int kBytes, class T>
LFM_INLINE void product_chunk_body(const Products<T>& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                   T* buffer) {
  constexpr int kLanes = simd::kLanes<T, kBytes>, kWide = 2 * kLanes, kMost = kMostRows<kBytes>;
  constexpr int64_t kDepth = kDepthBytes / sizeof(T);
  using V = simd::Vec<T, kLanes>;
  T *x = buffer, *y = buffer + (kChunkRows + kMost) * kDepth;
  const auto width_of = [&](int64_t j) { return columns - j > kLanes ? kWide : kLanes; };
  for (int64_t k = 0; k < p.n; k += kDepth) {
    const int64_t depth = std::min(kDepth, p.n - k);
    for (int64_t i = 0, height; i < rows; i += height) {
      height = panel_rows<kBytes>(rows - i);
      pack<kBytes>(p.x + (row + i) * p.n + k, p.n, rows - i, depth, height, x + i * depth);
    }
    for (int64_t j = 0; j < columns; j += kWide)
      pack<kBytes>(p.y + (column + j) * p.n + k, p.n, columns - j, depth, width_of(j), y + j * depth);
    for (int64_t i = 0, height; i < rows; i += height) {
      height = panel_rows<kBytes>(rows - i);
      for (int64_t j = 0; j < columns; j += kWide) {
        const int64_t width = width_of(j), real_rows = std::min(height, rows - i);
        const int64_t real_columns = std::min(width, columns - j);
        T* out = p.out + (row + i) * p.y_rows + column + j;
        if (width == kWide) {
          panel<2, kMost, V>(height, x + i * depth, y + j * depth, depth, real_rows, real_columns, k == 0, out,
                             p.y_rows);
        } else {
          panel<1, kMost, V>(height, x + i * depth, y + j * depth, depth, real_rows, real_columns, k == 0, out,
                             p.y_rows);
        }
      }
    }
  }
}

LFM_SIMD_DISPATCH(template <class T>, void, product_chunk,
                  (const Products<T>& p, int64_t row, int64_t rows, int64_t column, int64_t columns, T* buffer),
                  (p, row, rows, column, columns, buffer))

}  // namespace

Tensor inner_products_cpu(Tensor x, Tensor y) {
  check_dim("x", x, 2);
  check_contiguous("x", x);
  check_floating("x", x);
  check_like("y", y, "x", x);
  check_dim("y", y, 2);
  check_contiguous("y", y);
  check_size("y", y, 1, x.size(1));
  const int64_t x_rows = x.size(0), y_rows = y.size(0), n = x.size(1);
  if (n == 0) return torch::stable::new_zeros(x, {x_rows, y_rows});
  Tensor out = torch::stable::new_empty(x, {x_rows, y_rows});
  if (x_rows == 0 || y_rows == 0) return out;
  // chunks for every thread; in whole panels, to pack and to multiply as little more as possible
  const int64_t threads = torch::stable::get_num_threads();
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t down = ceil_div(x_rows, kChunkRows), across = ceil_div(y_rows, kChunkColumns);
  if (down * across < threads) across = std::min(ceil_div(threads, down), ceil_div(y_rows, kPanelColumns));
  if (down * across < threads) down = std::min(ceil_div(threads, across), ceil_div(x_rows, kPanelRows));
  const int64_t height = ceil_div(ceil_div(x_rows, down), kPanelRows) * kPanelRows;
  const int64_t width = ceil_div(ceil_div(y_rows, across), kPanelColumns) * kPanelColumns;
  down = ceil_div(x_rows, height);
  across = ceil_div(y_rows, width);
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Products<T> p{n, x_rows, y_rows, x.const_data_ptr<T>(), y.const_data_ptr<T>(), out.mutable_data_ptr<T>()};
    parallel_tasks(down * across, [&](int64_t task) {
      const int64_t row = task / across * height, column = task % across * width;
      // filled before it is read; of the thread that reads it
      auto buffer =
          uninitialized<T>((kChunkRows + kPanelRows + kChunkColumns + kPanelColumns) * (kDepthBytes / sizeof(T)));
      product_chunk(p, row, std::min(height, x_rows - row), column, std::min(width, y_rows - column), buffer.get());
    });
  });
  return out;
}

}  // namespace lfm
