// edge_products: left_i right_j <g_i, x_j> for every edge, the gradient of laplacian_product in the weights. Within
// rounding of `edge_products_reference`: two sums of vectors in a fixed order, the same for any number of threads. The
// CSR is valid, and offsets have 64 bits.
#include <type_traits>
#include <utility>

#include "checks.h"
#include "laplacian/laplacian.h"
#include "laplacian/rows.h"
#include "simd.h"

namespace lfm {
namespace {

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

}  // namespace

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
