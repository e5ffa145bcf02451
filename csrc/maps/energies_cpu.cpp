// map_energies: readings of many functional maps at once. The maps come as one matrix product over two stacks of bases;
// each is copied once into a buffer that stays in cache, and both of its Gram matrices are reduced in registers:
// neither they nor any other array per pair reaches memory.
// Within rounding of `map_energies_reference`. Copies are padded with zeros to whole vectors and whole blocks of rows,
// so that loops may run past the edges of a map. A task has a buffer of its own, and writes entries of its own.
#include <algorithm>
#include <type_traits>

#include "maps/maps.h"
#include "parallel.h"
#include "simd.h"

namespace lfm {
namespace {

constexpr int kRows = 4;  // rows of a Gram matrix held in registers

template <class T>
struct Maps {
  MapSizes sizes;
  int64_t skip, ld_x, ld_y;  // padded widths of the two copies of a map
  const T *C, *evals_x, *evals_y, *weight_x, *weight_y;
  int64_t evals_x_step, weight_x_step;  // from one map of y to the next; 0 where all share them
  bool evals_y_shared, weight_y_shared;
  T* out;
};

template <class V, class T>
LFM_INLINE T lanes_total(V v) {
  T total = 0;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(T); ++lane) total += v[lane];
  return total;
}

// Squares of a Gram matrix: on its diagonal, in the square blocks on the diagonal without it, and right of those.
template <class V>
struct Squares {
  V on, beside, right;
};

// Rows i to i + kRows of G = R^T R for R [rows, ld], columns first to first + kVectors vectors. The first kDiagonal
// vectors are of a block on the diagonal.
template <int kVectors, int kDiagonal, class V, class T>
LFM_INLINE void gram_block(const T* R, int64_t rows, int64_t ld, int64_t i, int64_t first, Squares<V>& squares) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  V sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < rows; ++k) {
    V right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = simd::load<V>(R + k * ld + first + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const T left = R[k * ld + i + r];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
  }
  T lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<T>(lane);
  const V lane = simd::load<V>(lanes);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const V square = sums[r][v] * sums[r][v];
      if (v >= kDiagonal) {
        squares.right += square;
        continue;
      }
      const auto on = lane == static_cast<T>(i + r - first - v * kLanes);
      squares.on += on ? square : V{};
      squares.beside += on ? V{} : square;
    }
  }
}

template <int kVectors, int kDiagonal, class V, class T>
LFM_INLINE void gram_rest(int64_t vectors, const T* R, int64_t rows, int64_t ld, int64_t i, int64_t first,
                          Squares<V>& squares) {
  if (vectors == kVectors) return gram_block<kVectors, kDiagonal>(R, rows, ld, i, first, squares);
  if constexpr (kVectors > std::max(kDiagonal, 1))
    gram_rest<kVectors - 1, kDiagonal>(vectors, R, rows, ld, i, first, squares);
}

// on = sum_i G_ii^2 and off = sum_{i != j} G_ij^2 of G = R^T R, for R [rows, ld] padded with zero columns. G is
// symmetric: what lies right of the blocks on the diagonal counts twice.
template <int kBytes, class T>
LFM_INLINE void gram_norms(const T* R, int64_t rows, int64_t columns, int64_t ld, T& on, T& off) {
  constexpr int kLanes = simd::kLanes<T, kBytes>, kMost = kBytes == 64 ? 4 : 2;
  constexpr int kBlock = std::max(kLanes, kRows), kDiagonal = kBlock / kLanes;
  using V = simd::Vec<T, kLanes>;
  Squares<V> squares{};
  for (int64_t i = 0; i < columns; i += kRows) {
    int64_t first = i / kBlock * kBlock;
    const int64_t vectors = std::min<int64_t>(kMost, (ld - first) / kLanes);
    gram_rest<kMost, kDiagonal>(vectors, R, rows, ld, i, first, squares);
    for (first += vectors * kLanes; first + kMost * kLanes <= ld; first += kMost * kLanes)
      gram_block<kMost, 0>(R, rows, ld, i, first, squares);
    if (first < ld) gram_rest<kMost - 1, 0>((ld - first) / kLanes, R, rows, ld, i, first, squares);
  }
  on = lanes_total<V, T>(squares.on);
  off = lanes_total<V, T>(squares.beside) + 2 * lanes_total<V, T>(squares.right);
}

// Copies a map, padded with zeros, and sums over its entries; the copy then leaves out the first `skip` functions.
template <int kBytes, class T>
LFM_INLINE void copy_and_sum(const Maps<T>& p, const T* C, const T* b, const T* w, T* factors, T* rows, T* out) {
  constexpr int kLanes = simd::kLanes<T, kBytes>;
  using V = simd::Vec<T, kLanes>;
  const auto [ys, m_y, xs, m_x] = p.sizes;
  const T *a = factors, *u = factors + p.ld_x;
  V carried = {}, weighted = {}, commutator = {};
  for (int64_t j = 0; j < m_y; ++j) {
    T* copy = rows + j * p.ld_x;
    std::copy_n(C + j * xs * m_x, m_x, copy);
    const T value = b[j], weight = w[j];
    for (int64_t i = 0; i < p.ld_x; i += kLanes) {
      const V entry = simd::load<V>(copy + i), square = entry * entry, gap = value - simd::load<V>(a + i);
      carried += square;
      weighted += weight * simd::load<V>(u + i) * square;
      commutator += gap * gap * square;
    }
    std::fill_n(copy, j < p.skip ? m_x : std::min(p.skip, m_x), T(0));
  }
  out[kCarried] = lanes_total<V, T>(carried);
  out[kWeighted] = lanes_total<V, T>(weighted);
  out[kCommutator] = lanes_total<V, T>(commutator);
}

template <int kBytes, class T>
LFM_INLINE void map_range_body(const Maps<T>& p, int64_t begin, int64_t end, T* buffer) {
  const auto [ys, m_y, xs, m_x] = p.sizes;
  T *rows = buffer, *columns = rows + m_y * p.ld_x, *factors = columns + m_x * p.ld_y;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t y = task / xs, x = task % xs;
    std::copy_n(p.evals_x + y * p.evals_x_step + x * m_x, m_x, factors);
    std::copy_n(p.weight_x + y * p.weight_x_step + x * m_x, m_x, factors + p.ld_x);
    T* out = p.out + task * kEnergies;
    copy_and_sum<kBytes>(p, p.C + (y * m_y * xs + x) * m_x, p.evals_y + (p.evals_y_shared ? y : task) * m_y,
                         p.weight_y + (p.weight_y_shared ? y : task) * m_y, factors, rows, out);
    for (int64_t i = 0; i < m_x; ++i)
      for (int64_t j = 0; j < m_y; ++j) columns[i * p.ld_y + j] = rows[j * p.ld_x + i];
    const int64_t skip_y = std::min(p.skip, m_y), skip_x = std::min(p.skip, m_x);
    gram_norms<kBytes>(rows + skip_y * p.ld_x, m_y - skip_y, m_x, p.ld_x, out[kOnX], out[kOffX]);
    gram_norms<kBytes>(columns + skip_x * p.ld_y, m_x - skip_x, m_y, p.ld_y, out[kOnY], out[kOffY]);
  }
}

LFM_SIMD_DISPATCH(template <class T>, void, map_range, (const Maps<T>& p, int64_t begin, int64_t end, T* buffer),
                  (p, begin, end, buffer))

}  // namespace

Tensor map_energies_cpu(Tensor C, Tensor evals_x, Tensor evals_y, Tensor weight_x, Tensor weight_y, int64_t skip) {
  const MapSizes s = check_maps(C, evals_x, evals_y, weight_x, weight_y, skip);
  Tensor out = torch::stable::new_empty(C, {s.ys, s.xs, kEnergies});
  const int64_t pairs = s.ys * s.xs;
  if (pairs == 0) return out;
  dispatch_floating("C", C, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // whole vectors of the widest registers, and whole blocks of rows
    constexpr int64_t kPad = std::max<int64_t>(64 / sizeof(T), kRows);
    const auto padded = [](int64_t m) { return (m + kPad - 1) / kPad * kPad; };
    const Maps<T> p{s,
                    skip,
                    padded(s.m_x),
                    padded(s.m_y),
                    C.const_data_ptr<T>(),
                    evals_x.const_data_ptr<T>(),
                    evals_y.const_data_ptr<T>(),
                    weight_x.const_data_ptr<T>(),
                    weight_y.const_data_ptr<T>(),
                    evals_x.size(0) == 1 ? 0 : s.xs * s.m_x,
                    weight_x.size(0) == 1 ? 0 : s.xs * s.m_x,
                    evals_y.size(1) == 1,
                    weight_y.size(1) == 1,
                    out.mutable_data_ptr<T>()};
    const int64_t tasks = std::min<int64_t>(pairs, torch::stable::get_num_threads() * 8);
    const int64_t scratch = s.m_y * p.ld_x + s.m_x * p.ld_y + 2 * p.ld_x;
    Tensor buffers = torch::stable::new_zeros(C, {tasks, scratch});
    T* buffer = buffers.mutable_data_ptr<T>();
    parallel_tasks(tasks, [&](int64_t task) {
      map_range(p, pairs * task / tasks, pairs * (task + 1) / tasks, buffer + task * scratch);
    });
  });
  return out;
}

}  // namespace lfm
