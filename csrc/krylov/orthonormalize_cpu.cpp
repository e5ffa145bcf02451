// orthonormalize_block: a block of 16 vectors made orthogonal to the panels of a Krylov space and orthonormal in
// itself. Long thin products, in which a general matrix product reads memory several times and threads have little to
// share. Here a panel is a row of 16 values, one or a few vector registers wide, so that coefficients, results and a
// whole 16 x 16 Gram matrix stay in registers.
// Within rounding of `orthonormalize_block_reference`. Rows are worked on in slabs that depend on nothing but the size,
// whose sums are added up in float64 and in order: the result is the same for any number of threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "krylov/krylov.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace lfm {
namespace {

constexpr int64_t kSlab = 2048;  // rows of a task
constexpr int64_t kNear = 2;     // panels that are projected out first
constexpr int64_t kChunk = 128;  // rows whose products are summed in the type of the values
// a column that loses this much to the panels is projected once more
constexpr double kKept = 0.7, kTerms = 0.1;
// a diagonal entry of the Cholesky factor of a correlation matrix: how much of a column the others leave
constexpr double kIndependent = 1e-2;

using Square = std::array<double, kBlock * kBlock>;

// sums[j][c] += sum_i a[i][j] x[i][c] for two blocks of 16 columns: a^T x.
template <int kBytes, class T>
LFM_INLINE void add_products_body(const T* a, const T* x, int64_t rows, double* sums) {
  constexpr int kLanes = simd::kLanes<T, kBytes>, kVectors = kBlock / kLanes;
  constexpr int kColumns = (kBytes == 64 ? 16 : 8) / kVectors;  // as many sums as registers hold
  using V = simd::Vec<T, kLanes>;
  for (int64_t first = 0; first < rows; first += kChunk) {
    const int64_t end = std::min(rows, first + kChunk);
    for (int64_t j = 0; j < kBlock; j += kColumns) {
      V part[kColumns][kVectors] = {};
      for (int64_t i = first; i < end; ++i) {
        V row[kVectors];
        for (int v = 0; v < kVectors; ++v) row[v] = simd::load<V>(x + i * kBlock + v * kLanes);
        for (int u = 0; u < kColumns; ++u)
          for (int v = 0; v < kVectors; ++v) part[u][v] += a[i * kBlock + j + u] * row[v];
      }
      for (int u = 0; u < kColumns; ++u)
        for (int v = 0; v < kVectors; ++v)
          for (int lane = 0; lane < kLanes; ++lane) sums[(j + u) * kBlock + v * kLanes + lane] += part[u][v][lane];
    }
  }
}

LFM_SIMD_DISPATCH(template <class T>, void, add_products, (const T* a, const T* x, int64_t rows, double* sums),
                  (a, x, rows, sums))

// out[i] = keep[i] + sum_j a[i][j] factor[j], keep left out where it is null; out may be keep or a.
template <int kBytes, class T>
LFM_INLINE void combine_rows_body(const T* keep, const T* a, const T* factor, int64_t rows, T* out) {
  constexpr int kLanes = simd::kLanes<T, kBytes>, kVectors = kBlock / kLanes;
  using V = simd::Vec<T, kLanes>;
  V f[kBlock][kVectors];
  for (int64_t j = 0; j < kBlock; ++j)
    for (int v = 0; v < kVectors; ++v) f[j][v] = simd::load<V>(factor + j * kBlock + v * kLanes);
  for (int64_t i = 0; i < rows; ++i) {
    V even[kVectors] = {}, odd[kVectors] = {};
    if (keep)
      for (int v = 0; v < kVectors; ++v) even[v] = simd::load<V>(keep + i * kBlock + v * kLanes);
    for (int64_t j = 0; j < kBlock; j += 2)
      for (int v = 0; v < kVectors; ++v) {
        even[v] += a[i * kBlock + j] * f[j][v];
        odd[v] += a[i * kBlock + j + 1] * f[j + 1][v];
      }
    for (int v = 0; v < kVectors; ++v) simd::store(out + i * kBlock + v * kLanes, V(even[v] + odd[v]));
  }
}

LFM_SIMD_DISPATCH(template <class T>, void, combine_rows,
                  (const T* keep, const T* a, const T* factor, int64_t rows, T* out), (keep, a, factor, rows, out))

// Upper R with R^T R = gram, and its inverse; false where a column is too much like the others (or 0).
bool cholesky(const Square& gram, Square& factor, Square& inverse) {
  factor.fill(0);
  inverse.fill(0);
  std::array<double, kBlock> norm;
  for (int64_t j = 0; j < kBlock; ++j) {
    norm[j] = std::sqrt(gram[j * kBlock + j]);
    if (!(norm[j] > 0)) return false;
  }
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t j = i; j < kBlock; ++j) {
      double sum = gram[i * kBlock + j] / (norm[i] * norm[j]);
      for (int64_t k = 0; k < i; ++k) sum -= factor[k * kBlock + i] * factor[k * kBlock + j];
      if (i == j) {
        if (!(sum > kIndependent * kIndependent)) return false;
        factor[i * kBlock + i] = std::sqrt(sum);
      } else {
        factor[i * kBlock + j] = sum / factor[i * kBlock + i];
      }
    }
  }
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t j = i; j < kBlock; ++j) factor[i * kBlock + j] *= norm[j];
  for (int64_t j = 0; j < kBlock; ++j) {
    inverse[j * kBlock + j] = 1 / factor[j * kBlock + j];
    for (int64_t i = j - 1; i >= 0; --i) {
      double sum = 0;
      for (int64_t k = i + 1; k <= j; ++k) sum += factor[i * kBlock + k] * inverse[k * kBlock + j];
      inverse[i * kBlock + j] = -sum / factor[i * kBlock + i];
    }
  }
  return true;
}

// One graph's part of the operator.
template <class T>
struct Step {
  const T *panels, *block;  // [panels][rows][16], [rows][16]
  int64_t rows, count;
  double scale;
  T* q;                  // [rows][16]
  double* coefficients;  // [16 panels][16]
  double* coupling;      // [16][16]
  bool* sound;
};

// Sums over the rows of what `add(begin, end, sums)` adds, slab by slab, `size` values.
template <class Slabs, class Add>
std::vector<double> summed(int64_t rows, int64_t size, const Slabs& slabs, const Add& add) {
  const int64_t pieces = (rows + kSlab - 1) / kSlab;
  std::vector<double> sums(static_cast<size_t>(pieces * size), 0.0);
  slabs(pieces,
        [&](int64_t slab) { add(slab * kSlab, std::min(rows, (slab + 1) * kSlab), sums.data() + slab * size); });
  for (int64_t slab = 1; slab < pieces; ++slab)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[slab * size + k];
  sums.resize(static_cast<size_t>(size));
  return sums;
}

template <class T, class Slabs>
Square gram_of(const T* q, int64_t rows, const Slabs& slabs) {
  const std::vector<double> sums = summed(rows, kBlock * kBlock, slabs, [&](int64_t begin, int64_t end, double* into) {
    add_products(q + begin * kBlock, q + begin * kBlock, end - begin, into);
  });
  Square gram;
  std::copy(sums.begin(), sums.end(), gram.begin());
  return gram;
}

// q <- q - sum_p panel_p (panel_p^T q) over the panels from `start` on, and the coefficients added up.
template <class T, class Slabs>
void project(const Step<T>& s, const T* from, int64_t start, const Slabs& slabs) {
  constexpr int64_t kSize = kBlock * kBlock;
  const int64_t count = s.count - start;
  const T* panels = s.panels + start * s.rows * kBlock;
  const std::vector<double> sums = summed(s.rows, count * kSize, slabs, [&](int64_t begin, int64_t end, double* into) {
    // a chunk of the block stays in the first cache while all panels pass
    for (int64_t first = begin; first < end; first += kChunk)
      for (int64_t p = 0; p < count; ++p)
        add_products(panels + (p * s.rows + first) * kBlock, from + first * kBlock, std::min(kChunk, end - first),
                     into + p * kSize);
  });
  std::vector<T> factors(sums.size());
  for (size_t k = 0; k < sums.size(); ++k) {
    s.coefficients[start * kSize + k] += sums[k];
    factors[k] = static_cast<T>(-sums[k]);
  }
  const int64_t pieces = (s.rows + kSlab - 1) / kSlab;
  slabs(pieces, [&](int64_t slab) {
    const int64_t end = std::min(s.rows, (slab + 1) * kSlab);
    for (int64_t first = slab * kSlab; first < end; first += kChunk) {
      const int64_t rows = std::min(kChunk, end - first);
      T* q = s.q + first * kBlock;
      if (q != from + first * kBlock) std::copy(from + first * kBlock, from + (first + rows) * kBlock, q);
      for (int64_t p = 0; p < count; ++p)
        combine_rows(q, panels + (p * s.rows + first) * kBlock, factors.data() + p * kSize, rows, q);
    }
  });
}

// slabs(pieces, body) calls body for every piece.
template <class T, class Slabs>
void run_step(const Step<T>& s, const Slabs& slabs) {
  // an image of the last panel lies mostly in the last two: without that part one pass over all is enough
  const bool local = s.count > kNear;
  if (local) project(s, s.block, s.count - kNear, slabs);
  const T* from = local ? s.q : s.block;
  const Square before = gram_of(from, s.rows, slabs);
  project(s, from, 0, slabs);
  Square gram = gram_of(s.q, s.rows, slabs), inverse, factor, total{};
  bool again = false;
  for (int64_t j = 0; j < kBlock; ++j) {
    const int64_t own = j * kBlock + j;
    again |= std::sqrt(gram[own]) < kKept * std::max(std::sqrt(before[own]), kTerms * s.scale);
    total[own] = 1;
  }
  if (again && s.count > 0) {
    project(s, static_cast<const T*>(s.q), 0, slabs);
    gram = gram_of(s.q, s.rows, slabs);
  }
  *s.sound = true;
  for (int sweep = 0; sweep < 2; ++sweep) {
    if (sweep > 0) gram = gram_of(s.q, s.rows, slabs);
    if (!cholesky(gram, factor, inverse)) {
      *s.sound = false;
      return;
    }
    std::array<T, kBlock * kBlock> rounded;
    for (size_t k = 0; k < rounded.size(); ++k) rounded[k] = static_cast<T>(inverse[k]);
    slabs((s.rows + kSlab - 1) / kSlab, [&](int64_t slab) {
      const int64_t begin = slab * kSlab, end = std::min(s.rows, begin + kSlab);
      T* q = s.q + begin * kBlock;
      combine_rows(static_cast<const T*>(nullptr), static_cast<const T*>(q), rounded.data(), end - begin, q);
    });
    Square product{};
    for (int64_t i = 0; i < kBlock; ++i)
      for (int64_t k = i; k < kBlock; ++k)
        for (int64_t j = k; j < kBlock; ++j) product[i * kBlock + j] += factor[i * kBlock + k] * total[k * kBlock + j];
    total = product;
  }
  std::copy(total.begin(), total.end(), s.coupling);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> orthonormalize_block_cpu(Tensor panels, Tensor block, double scale) {
  check_dim("block", block, 3);
  check_size("block", block, 2, kBlock);
  check_floating("block", block);
  check_contiguous("block", block);
  check_dim("panels", panels, 4);
  check_like("panels", panels, "block", block);
  check_size("panels", panels, 0, block.size(0));
  check_size("panels", panels, 2, block.size(1));
  check_size("panels", panels, 3, kBlock);
  const int64_t graphs = block.size(0), rows = block.size(1), count = panels.size(1);
  LFM_CHECK(panels.stride(3) == 1 && panels.stride(2) == kBlock && (count <= 1 || panels.stride(1) == rows * kBlock),
            "panels must be contiguous but for the first dimension, got strides of another layout, shape ",
            shape_of(panels));
  Tensor q = torch::stable::new_empty(block, block.sizes());
  prefer_large_pages(q);
  Tensor coefficients = torch::stable::new_zeros(block, {graphs, count * kBlock, kBlock}, ScalarType::Double);
  Tensor coupling = torch::stable::new_zeros(block, {graphs, kBlock, kBlock}, ScalarType::Double);
  Tensor sound = torch::stable::new_zeros(block, {graphs}, ScalarType::Bool);
  if (graphs == 0 || rows == 0) return {q, coefficients, coupling, sound};
  dispatch_floating("block", block, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *from = block.const_data_ptr<T>(), *space = panels.const_data_ptr<T>();
    T* into = q.mutable_data_ptr<T>();
    double *c = coefficients.mutable_data_ptr<double>(), *r = coupling.mutable_data_ptr<double>();
    bool* flags = sound.mutable_data_ptr<bool>();
    const int64_t stride = panels.stride(0), size = rows * kBlock;
    const auto step_of = [&](int64_t g) {
      return Step<T>{space + g * stride,
                     from + g * size,
                     rows,
                     count,
                     scale,
                     into + g * size,
                     c + g * count * kBlock * kBlock,
                     r + g * kBlock * kBlock,
                     flags + g};
    };
    if (graphs >= 2 * torch::stable::get_num_threads()) {
      parallel_tasks(graphs, [&](int64_t g) {
        run_step(step_of(g), [](int64_t pieces, const auto& body) {
          for (int64_t piece = 0; piece < pieces; ++piece) body(piece);
        });
      });
    } else {
      for (int64_t g = 0; g < graphs; ++g)
        run_step(step_of(g), [](int64_t pieces, const auto& body) { parallel_tasks(pieces, body); });
    }
  });
  return {q, coefficients, coupling, sound};
}

}  // namespace lfm
