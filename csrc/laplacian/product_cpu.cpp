// laplacian_product: y = a (diagonal x - left W (right x)) + b x + c z, one pass over the edges. The block is copied,
// panel by panel, into rows of 128 bytes, scaled by right: random rows are then read two cache lines at a time, which
// is far faster than whole rows of a wide block. Half types are stored in half the space, so a panel has twice their
// columns. Within rounding of `laplacian_product_reference`, the same for any number of threads; half types are summed
// in float32 and rounded once. The CSR is valid, and offsets have 64 bits.
#include "checks.h"
#include "laplacian/laplacian.h"
#include "laplacian/rows.h"
#include "laplacian/storage.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace lfm {
namespace {

constexpr int64_t kPanelBytes = 128;

// S: how the block is stored; T: what is computed in.
template <class S, class T>
struct Product {
  using Stored = S;
  using Value = T;
  Csr<T> graph;
  const T *diagonal, *left, *right;
  const S *x, *z;
  S* panel;
  S* y;
  int64_t columns;
  T a, b, c;
};

template <class S>
inline constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(S));

template <class S>
int64_t panels_of(int64_t columns) {
  return (columns + kPanel<S> - 1) / kPanel<S>;
}

// Columns [first, first + width) of the block, kept as rows of `padded` values: whole vectors, or a power of two below.
struct Panel {
  int64_t first, width, padded;
};

template <class S, int kLanes>
LFM_INLINE Panel panel_of(int64_t index, int64_t columns) {
  const int64_t first = index * kPanel<S>, width = std::min(columns - first, kPanel<S>);
  int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
  if (width < kLanes) {
    padded = 2;  // a single column as well: two lanes are twice as fast as a scalar
    while (padded < width) padded *= 2;
  }
  return {first, width, padded};
}

template <int kBytes, class P>
LFM_INLINE void pack_rows_body(const P& p, int64_t index, int64_t begin, int64_t end) {
  using S = typename P::Stored;
  using T = typename P::Value;
  const Panel panel = panel_of<S, simd::kLanes<T, kBytes>>(index, p.columns);
  S* into = p.panel + begin * panel.padded;
  for (int64_t i = begin; i < end; ++i, into += panel.padded) {
    const S* from = p.x + i * p.columns + panel.first;
    if constexpr (std::is_same_v<S, T>) {
      const T scale = p.right[i];
      for (int64_t c = 0; c < panel.width; ++c) into[c] = scale * from[c];
    } else {  // not scaled: it would be rounded once more
      for (int64_t c = 0; c < panel.width; ++c) into[c] = from[c];
    }
    for (int64_t c = panel.width; c < panel.padded; ++c) into[c] = S{};
  }
}

LFM_SIMD_DISPATCH(template <class P>, void, pack_rows, (const P& p, int64_t index, int64_t begin, int64_t end),
                  (p, index, begin, end))

// sum_e weight_e right_j x_j over the edges of row i, for a panel of kVectors vectors.
template <class V, int kVectors, class S, class T>
LFM_INLINE void accumulate(const Product<S, T>& p, const S* rows, int64_t i, V (&sum)[kVectors]) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  constexpr int kUnroll =
      kVectors >= 4 ? 1 : (kVectors >= 2 ? 2 : 4);  // independent chains hide the latency of the FMA
  V part[kUnroll][kVectors] = {};
  const int64_t end = p.graph.rowptr[i + 1];
  int64_t e = p.graph.rowptr[i];
  const auto add = [&](V(&into)[kVectors], int64_t edge) __attribute__((always_inline)) {
    const int64_t j = p.graph.col[edge];
    const T w = std::is_same_v<S, T> ? p.graph.weight[edge] : p.graph.weight[edge] * p.right[j];
    const S* row = rows + j * (kVectors * kLanes);
    for (int v = 0; v < kVectors; ++v) into[v] += w * simd::load_as<V>(row + v * kLanes);
  };
  for (; e + kUnroll <= end; e += kUnroll)
    for (int u = 0; u < kUnroll; ++u) add(part[u], e + u);
  for (; e < end; ++e) add(part[0], e);
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = part[0][v];
    for (int u = 1; u < kUnroll; ++u) sum[v] += part[u][v];
  }
}

template <class V, int kVectors, class S, class T>
LFM_INLINE void rows_of(const Product<S, T>& p, const Panel& panel, int64_t begin, int64_t end) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  const S* rows = p.panel;
  for (int64_t i = begin; i < end; ++i) {
    V sum[kVectors];
    accumulate<V, kVectors>(p, rows, i, sum);
    const T own = p.a * p.diagonal[i] + p.b, other = -p.a * p.left[i];
    const int64_t at = i * p.columns + panel.first;
    const auto result = [&](const S* x, const S* z, int v) __attribute__((always_inline)) {
      V y = own * simd::load_as<V>(x + v * kLanes) + other * sum[v];
      if (z) y += p.c * simd::load_as<V>(z + v * kLanes);
      return y;
    };
    if (panel.width == panel.padded) {
      for (int v = 0; v < kVectors; ++v)
        simd::store_as(p.y + at + v * kLanes, result(p.x + at, p.z ? p.z + at : nullptr, v));
    } else {  // the last columns of the block: through buffers of whole vectors
      S x[kVectors * kLanes] = {}, z[kVectors * kLanes] = {}, y[kVectors * kLanes];
      std::memcpy(x, p.x + at, panel.width * sizeof(S));
      if (p.z) std::memcpy(z, p.z + at, panel.width * sizeof(S));
      for (int v = 0; v < kVectors; ++v) simd::store_as(y + v * kLanes, result(x, p.z ? z : nullptr, v));
      std::memcpy(p.y + at, y, panel.width * sizeof(S));
    }
  }
}

// Calls rows_of for so many vectors, at most kVectors.
template <class V, int kVectors, class S, class T>
LFM_INLINE void rows_of_up_to(int vectors, const Product<S, T>& p, const Panel& panel, int64_t begin, int64_t end) {
  if (vectors == kVectors) return rows_of<V, kVectors>(p, panel, begin, end);
  if constexpr (kVectors > 1) rows_of_up_to<V, kVectors - 1>(vectors, p, panel, begin, end);
}

// One vector of the power of two that holds a narrow panel.
template <int kLanes, class S, class T>
LFM_INLINE void narrow_rows(const Product<S, T>& p, const Panel& panel, int64_t begin, int64_t end) {
  if constexpr (kLanes > 2) {
    if (panel.padded < kLanes) return narrow_rows<kLanes / 2>(p, panel, begin, end);
  }
  rows_of<simd::Vec<T, kLanes>, 1>(p, panel, begin, end);
}

template <int kLanes, class S, class T>
LFM_INLINE void panel_rows(const Product<S, T>& p, const Panel& panel, int64_t begin, int64_t end) {
  constexpr int kMost = static_cast<int>(kPanel<S>) / kLanes;
  if (panel.padded < kLanes) return narrow_rows<kLanes>(p, panel, begin, end);
  rows_of_up_to<simd::Vec<T, kLanes>, kMost>(static_cast<int>(panel.padded / kLanes), p, panel, begin, end);
}

template <int kBytes, class P>
LFM_INLINE void product_rows_body(const P& p, int64_t index, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanes<typename P::Value, kBytes>;
  panel_rows<kLanes>(p, panel_of<typename P::Stored, kLanes>(index, p.columns), begin, end);
}

LFM_SIMD_DISPATCH(template <class P>, void, product_rows, (const P& p, int64_t index, int64_t begin, int64_t end),
                  (p, index, begin, end))

// Calls body with null pointers of the type a block is stored in and of the type it is computed in.
template <class Body>
void dispatch_stored(const Tensor& x, Body&& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<Bfloat16*>(nullptr), static_cast<float*>(nullptr));
    default:
      return body(static_cast<Float16*>(nullptr), static_cast<float*>(nullptr));
  }
}

}  // namespace

Tensor laplacian_product_cpu(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                             Tensor x, std::optional<Tensor> z, double a, double b, double c) {
  check_csr(rowptr, col);
  check_dim("x", x, 2);
  check_contiguous("x", x);
  const int64_t rows = rowptr.size(0) - 1;
  check_size("x", x, 0, rows);
  check_block_type("x", x, "weight", weight);
  check_contiguous("weight", weight);
  check_dim("weight", weight, 1);
  check_size("weight", weight, 0, col.size(0));
  const std::pair<const char*, const Tensor*> scalings[] = {
      {"diagonal", &diagonal}, {"left", &left}, {"right", &right}};
  for (const auto& [name, t] : scalings) {
    check_like(name, *t, "weight", weight);
    check_dim(name, *t, 1);
    check_size(name, *t, 0, rows);
    check_contiguous(name, *t);
  }
  if (z) {
    check_like("z", *z, "x", x);
    check_dim("z", *z, 2);
    check_size("z", *z, 0, rows);
    check_size("z", *z, 1, x.size(1));
    check_contiguous("z", *z);
  }
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (rows == 0 || x.size(1) == 0) return y;
  // one panel after the other, so that the copy is still in cache when it is read
  const int64_t widest = kPanelBytes / static_cast<int64_t>(x.element_size());
  Tensor panel = torch::stable::new_empty(x, {rows, widest});
  prefer_large_pages(y);
  prefer_large_pages(panel);
  dispatch_stored(x, [&](auto* stored, auto* value) {
    using S = std::remove_pointer_t<decltype(stored)>;
    using T = std::remove_pointer_t<decltype(value)>;
    const Csr<T> graph{rowptr.const_data_ptr<int64_t>(), col.const_data_ptr<int32_t>(), weight.const_data_ptr<T>(),
                       rows};
    const Product<S, T> p{graph,
                          diagonal.const_data_ptr<T>(),
                          left.const_data_ptr<T>(),
                          right.const_data_ptr<T>(),
                          static_cast<const S*>(x.const_data_ptr()),
                          z ? static_cast<const S*>(z->const_data_ptr()) : nullptr,
                          static_cast<S*>(panel.mutable_data_ptr()),
                          static_cast<S*>(y.mutable_data_ptr()),
                          x.size(1),
                          static_cast<T>(a),
                          static_cast<T>(b),
                          static_cast<T>(c)};
    for (int64_t index = 0; index < panels_of<S>(p.columns); ++index) {
      const int64_t width = std::min(kPanel<S>, p.columns - index * kPanel<S>);
      over_rows(graph, width, [&](int64_t begin, int64_t end) { pack_rows(p, index, begin, end); });
      over_rows(graph, width, [&](int64_t begin, int64_t end) { product_rows(p, index, begin, end); });
    }
  });
  return y;
}

}  // namespace lfm
