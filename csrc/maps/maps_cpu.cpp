// Readings of many functional maps at once. The maps come as one matrix product over stacked bases, C [A, m_y, B, m_x];
// each is copied once into a buffer that stays in cache, and both of its Gram matrices are reduced in registers:
// neither they nor any other array per pair reaches memory.
#include <algorithm>
#include <type_traits>

#include "../parallel.h"
#include "../simd.h"
#include "maps.h"

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

// on = sum_i G_ii^2 and off = sum_{i != j} G_ij^2 of G = R^T R, for R [rows, ld] padded with zero columns.
template <class V, int kVectors, class T>
LFM_INLINE void gram_block(const T* R, int64_t rows, int64_t ld, int64_t i, int64_t first, T& on, V& off) {
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
  for (int r = 0; r < kRows; ++r) {
    const int64_t lane = i + r - first;
    if (lane >= 0 && lane < kVectors * kLanes) {
      T row[kVectors * kLanes];
      std::memcpy(row, sums[r], sizeof(row));
      on += row[lane] * row[lane];
      row[lane] = 0;
      std::memcpy(sums[r], row, sizeof(row));
    }
    for (int v = 0; v < kVectors; ++v) off += sums[r][v] * sums[r][v];
  }
}

template <class V, class T>
LFM_INLINE T lanes_total(V v) {
  T total = 0;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(T); ++lane) total += v[lane];
  return total;
}

template <int kBytes, class T>
LFM_INLINE void gram_norms(const T* R, int64_t rows, int64_t columns, int64_t ld, T& on, T& off) {
  constexpr int kLanes = simd::kLanes<T, kBytes>, kMost = kBytes == 64 ? 4 : 2;
  using V = simd::Vec<T, kLanes>;
  on = 0;
  V sum = {};
  for (int64_t i = 0; i < columns; i += kRows) {
    int64_t first = 0;
    for (; first + kMost * kLanes <= ld; first += kMost * kLanes) gram_block<V, kMost>(R, rows, ld, i, first, on, sum);
    for (; first < ld; first += kLanes) gram_block<V, 1>(R, rows, ld, i, first, on, sum);
  }
  off = lanes_total<V, T>(sum);
}

template <int kBytes, class T>
LFM_INLINE void map_range_body(const Maps<T>& p, int64_t begin, int64_t end, T* buffer) {
  const auto [ys, m_y, xs, m_x] = p.sizes;
  T *rows = buffer, *columns = buffer + m_y * p.ld_x;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t y = task / xs, x = task % xs;
    const T* C = p.C + (y * m_y * xs + x) * m_x;
    const T *a = p.evals_x + y * p.evals_x_step + x * m_x, *u = p.weight_x + y * p.weight_x_step + x * m_x;
    const T* b = p.evals_y + (p.evals_y_shared ? y : task) * m_y;
    const T* w = p.weight_y + (p.weight_y_shared ? y : task) * m_y;
    T carried = 0, weighted = 0, commutator = 0;
    for (int64_t j = 0; j < m_y; ++j) {
      const T* row = C + j * xs * m_x;
      T* copy = rows + j * p.ld_x;
      T sum = 0, heat = 0, gap = 0;
      for (int64_t i = 0; i < m_x; ++i) {
        const T square = row[i] * row[i], difference = b[j] - a[i];
        sum += square;
        heat += u[i] * square;
        gap += difference * difference * square;
        copy[i] = i < p.skip ? 0 : row[i];
        columns[i * p.ld_y + j] = j < p.skip ? 0 : row[i];
      }
      carried += sum;
      weighted += w[j] * heat;
      commutator += gap;
    }
    T* out = p.out + task * kEnergies;
    out[kCarried] = carried;
    out[kWeighted] = weighted;
    out[kCommutator] = commutator;
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
    const int64_t scratch = s.m_y * p.ld_x + s.m_x * p.ld_y;
    Tensor buffers = torch::stable::new_zeros(C, {tasks, scratch});
    T* buffer = buffers.mutable_data_ptr<T>();
    parallel_tasks(tasks, [&](int64_t task) {
      map_range(p, pairs * task / tasks, pairs * (task + 1) / tasks, buffer + task * scratch);
    });
  });
  return out;
}

}  // namespace lfm
