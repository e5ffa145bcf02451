// laplacian_product: y = a (diagonal x - left W (right x)) + b x + c z, one pass over the edges, and its gradient in
// the edge weights. Columns are the vector dimension; up to kChunk vectors of a row of y stay in registers.
#include "checks.h"
#include "laplacian/laplacian.h"
#include "parallel.h"
#include "simd.h"

namespace lfm {
namespace {

constexpr int kChunk = 8;                 // vectors of accumulators
constexpr int64_t kNarrow = 32;           // columns up to which right x is formed first
constexpr int64_t kSerialWork = 1 << 15;  // multiply-adds below which threads cost more than they save

template <class T>
struct Csr {
  const int64_t* rowptr;
  const int32_t* col;
  const T* weight;
  int64_t rows;
};

template <class T>
struct Product {
  Csr<T> graph;
  const T *diagonal, *left, *right, *x, *z;
  const T* scaled;  // right x, or null: x itself is gathered and scaled edge by edge
  T* y;
  int64_t columns;
  T a, b, c;
};

// sum_e weight_e right_j x_j over the edges of row i, for kVectors vectors starting at column `first`; the last vector
// starts at `last` and may overlap the one before it, so that no column count needs a scalar remainder.
template <bool kScaled, class V, int kVectors, class T>
LFM_INLINE void accumulate(const Product<T>& p, int64_t i, int64_t first, int64_t last, V (&sum)[kVectors]) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  constexpr int kUnroll =
      kVectors >= 4 ? 1 : (kVectors >= 2 ? 2 : 4);  // independent chains hide the latency of the FMA
  V part[kUnroll][kVectors] = {};
  const int64_t end = p.graph.rowptr[i + 1];
  int64_t e = p.graph.rowptr[i];
  const auto add = [&](V(&into)[kVectors], int64_t edge) __attribute__((always_inline)) {
    const int64_t j = p.graph.col[edge];
    const T w = kScaled ? p.graph.weight[edge] : p.graph.weight[edge] * p.right[j];
    const T* row = (kScaled ? p.scaled : p.x) + j * p.columns;
    for (int v = 0; v < kVectors - 1; ++v) into[v] += w * simd::load<V>(row + first + v * kLanes);
    into[kVectors - 1] += w * simd::load<V>(row + last);
  };
  for (; e + kUnroll <= end; e += kUnroll)
    for (int u = 0; u < kUnroll; ++u) add(part[u], e + u);
  for (; e < end; ++e) add(part[0], e);
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = part[0][v];
    for (int u = 1; u < kUnroll; ++u) sum[v] += part[u][v];
  }
}

template <class V, int kVectors, class T>
LFM_INLINE void rows_of(const Product<T>& p, int64_t begin, int64_t end, int64_t first, int64_t last) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  for (int64_t i = begin; i < end; ++i) {
    V sum[kVectors];
    if (p.scaled) {
      accumulate<true, V, kVectors>(p, i, first, last, sum);
    } else {
      accumulate<false, V, kVectors>(p, i, first, last, sum);
    }
    const T own = p.a * p.diagonal[i] + p.b, other = -p.a * p.left[i];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i * p.columns + (v == kVectors - 1 ? last : first + v * kLanes);
      V y = own * simd::load<V>(p.x + at) + other * sum[v];
      if (p.z) y += p.c * simd::load<V>(p.z + at);
      simd::store(p.y + at, y);
    }
  }
}

template <class V, class T>
LFM_INLINE void chunk_of(const Product<T>& p, int64_t begin, int64_t end, int64_t first, int64_t last, int vectors) {
  switch (vectors) {
    case 1:
      return rows_of<V, 1>(p, begin, end, first, last);
    case 2:
      return rows_of<V, 2>(p, begin, end, first, last);
    case 3:
      return rows_of<V, 3>(p, begin, end, first, last);
    case 4:
      return rows_of<V, 4>(p, begin, end, first, last);
    case 5:
      return rows_of<V, 5>(p, begin, end, first, last);
    case 6:
      return rows_of<V, 6>(p, begin, end, first, last);
    case 7:
      return rows_of<V, 7>(p, begin, end, first, last);
    default:
      return rows_of<V, kChunk>(p, begin, end, first, last);
  }
}

template <int kBytes, class T>
LFM_INLINE void product_rows_body(const Product<T>& p, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanes<T, kBytes>;
  using V = simd::Vec<T, kLanes>;
  if (p.columns < kLanes) {  // narrower than a vector: one column at a time
    for (int64_t c = 0; c < p.columns; ++c) chunk_of<simd::Vec<T, 1>>(p, begin, end, c, c, 1);
    return;
  }
  for (int64_t first = 0; first < p.columns; first += kChunk * kLanes) {
    const int64_t width = std::min<int64_t>(p.columns - first, kChunk * kLanes);
    const int vectors = static_cast<int>((width + kLanes - 1) / kLanes);
    chunk_of<V>(p, begin, end, first, first + width - kLanes, vectors);
  }
}

LFM_SIMD_DISPATCH(template <class T>, void, product_rows, (const Product<T>& p, int64_t begin, int64_t end),
                  (p, begin, end))

template <class T>
struct EdgeProducts {
  Csr<T> graph;  // weight unused
  const T *left, *right, *g, *x;
  T* out;
  int64_t columns;
};

// left_i right_j <g_i, x_j>, for the edges of row i.
template <int kBytes, class T>
LFM_INLINE void edge_rows_body(const EdgeProducts<T>& p, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanes<T, kBytes>;
  using V = simd::Vec<T, kLanes>;
  const int64_t whole = p.columns / kLanes * kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const T* g = p.g + i * p.columns;
    for (int64_t e = p.graph.rowptr[i]; e < p.graph.rowptr[i + 1]; ++e) {
      const int64_t j = p.graph.col[e];
      const T* x = p.x + j * p.columns;
      V sums[2] = {};
      int64_t c = 0;
      for (; c + 2 * kLanes <= whole; c += 2 * kLanes) {
        sums[0] += simd::load<V>(g + c) * simd::load<V>(x + c);
        sums[1] += simd::load<V>(g + c + kLanes) * simd::load<V>(x + c + kLanes);
      }
      if (c < whole) sums[0] += simd::load<V>(g + c) * simd::load<V>(x + c);
      sums[0] += sums[1];
      T dot = 0;
      for (int lane = 0; lane < kLanes; ++lane) dot += sums[0][lane];
      for (c = whole; c < p.columns; ++c) dot += g[c] * x[c];
      p.out[e] = p.left[i] * p.right[j] * dot;
    }
  }
}

LFM_SIMD_DISPATCH(template <class T>, void, edge_rows, (const EdgeProducts<T>& p, int64_t begin, int64_t end),
                  (p, begin, end))

// Runs body(begin, end) over rows in pieces of about equal numbers of edges.
template <class T, class Body>
void over_rows(const Csr<T>& graph, int64_t columns, const Body& body) {
  const int64_t nnz = graph.rowptr[graph.rows];
  const int64_t work = (nnz + graph.rows) * columns;
  if (work < kSerialWork) return body(0, graph.rows);
  const int64_t pieces = std::min<int64_t>(graph.rows, torch::stable::get_num_threads() * 8);
  const auto boundary = [&](int64_t piece) {
    const int64_t edges = (nnz + graph.rows) * piece / pieces;
    // rows before which about `edges` edges (and rows, so that empty rows count) lie
    int64_t low = 0, high = graph.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (graph.rowptr[middle] + middle < edges ? low : high) =
          graph.rowptr[middle] + middle < edges ? middle + 1 : middle;
    }
    return low;
  };
  parallel_tasks(pieces, [&](int64_t piece) {
    body(piece == 0 ? 0 : boundary(piece), piece == pieces - 1 ? graph.rows : boundary(piece + 1));
  });
}

}  // namespace

Tensor laplacian_product_cpu(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                             Tensor x, std::optional<Tensor> z, double a, double b, double c) {
  check_csr(rowptr, col);
  check_dim("x", x, 2);
  check_contiguous("x", x);
  const int64_t rows = rowptr.size(0) - 1;
  check_size("x", x, 0, rows);
  check_like("weight", weight, "x", x);
  check_contiguous("weight", weight);
  check_dim("weight", weight, 1);
  check_size("weight", weight, 0, col.size(0));
  const std::pair<const char*, const Tensor*> scalings[] = {
      {"diagonal", &diagonal}, {"left", &left}, {"right", &right}};
  for (const auto& [name, t] : scalings) {
    check_like(name, *t, "x", x);
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
  check_floating("x", x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const bool narrow = x.size(1) <= kNarrow;
  Tensor scaled = torch::stable::new_empty(x, {narrow ? rows : 0, x.size(1)});
  if (rows == 0 || x.size(1) == 0) return y;
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Csr<T> graph{rowptr.const_data_ptr<int64_t>(), col.const_data_ptr<int32_t>(), weight.const_data_ptr<T>(),
                       rows};
    const Product<T> p{graph,
                       diagonal.const_data_ptr<T>(),
                       left.const_data_ptr<T>(),
                       right.const_data_ptr<T>(),
                       x.const_data_ptr<T>(),
                       z ? z->const_data_ptr<T>() : nullptr,
                       narrow ? scaled.const_data_ptr<T>() : nullptr,
                       y.mutable_data_ptr<T>(),
                       x.size(1),
                       static_cast<T>(a),
                       static_cast<T>(b),
                       static_cast<T>(c)};
    if (narrow) {
      T* into = scaled.mutable_data_ptr<T>();
      over_rows(graph, p.columns, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t c = 0; c < p.columns; ++c) into[i * p.columns + c] = p.right[i] * p.x[i * p.columns + c];
      });
    }
    over_rows(graph, p.columns, [&](int64_t begin, int64_t end) { product_rows(p, begin, end); });
  });
  return y;
}

Tensor edge_products_cpu(Tensor rowptr, Tensor col, Tensor left, Tensor right, Tensor g, Tensor x) {
  check_csr(rowptr, col);
  const int64_t rows = rowptr.size(0) - 1;
  check_dim("x", x, 2);
  check_size("x", x, 0, rows);
  check_contiguous("x", x);
  check_like("g", g, "x", x);
  check_dim("g", g, 2);
  check_size("g", g, 0, rows);
  check_size("g", g, 1, x.size(1));
  check_contiguous("g", g);
  const std::pair<const char*, const Tensor*> scalings[] = {{"left", &left}, {"right", &right}};
  for (const auto& [name, t] : scalings) {
    check_like(name, *t, "x", x);
    check_dim(name, *t, 1);
    check_size(name, *t, 0, rows);
    check_contiguous(name, *t);
  }
  check_floating("x", x);
  Tensor out = torch::stable::new_empty(x, {col.size(0)});
  if (col.size(0) == 0) return out;
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Csr<T> graph{rowptr.const_data_ptr<int64_t>(), col.const_data_ptr<int32_t>(), nullptr, rows};
    const EdgeProducts<T> p{graph,
                            left.const_data_ptr<T>(),
                            right.const_data_ptr<T>(),
                            g.const_data_ptr<T>(),
                            x.const_data_ptr<T>(),
                            out.mutable_data_ptr<T>(),
                            x.size(1)};
    over_rows(graph, p.columns, [&](int64_t begin, int64_t end) { edge_rows(p, begin, end); });
  });
  return out;
}

}  // namespace lfm
