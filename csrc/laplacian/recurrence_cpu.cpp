// laplacian_recurrence: y_k = a_k L y_{k-1} + b_k y_{k-1} + c_k y_{k-2}, a polynomial in L by its three-term
// recurrence, for the eigensolvers. Against one laplacian_product a degree it copies and scales the block only at both
// ends: in between it works on right * y, of which the next product reads rows as they are. Of many small graphs each
// goes through all its degrees at once, with everything it reads in cache.
// Within rounding of `laplacian_recurrence_reference`, the same for any number of threads, as long as right is 0 only
// at nodes without weight and no edge joins two of the graphs. The CSR is valid, and offsets have 64 bits.
#include "checks.h"
#include "laplacian/laplacian.h"
#include "laplacian/rows.h"
#include "memory.h"
#include "simd.h"

namespace lfm {
namespace {

constexpr int64_t kPanelBytes = 128;  // a row of the blocks: two cache lines are read together

template <class T>
inline constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(T));

template <class T>
struct Step {
  T a, b, c;
};

template <class T>
struct Recurrence {
  using Value = T;
  Csr<T> graph;
  const T *diagonal, *left, *right;
  const T* x;
  T* y;
  int64_t columns;

  // The scale of a node. Where right is 0 its row is read by nobody and may have any.
  LFM_INLINE T scale(int64_t i) const { return right[i] == 0 ? T{1} : right[i]; }
};

// Columns [first, first + width), rows of `padded` values in two blocks.
template <class T>
struct Panel {
  int64_t first, width, padded;
  T *previous, *current;
};

template <int kBytes, class R>
LFM_INLINE void enter_rows_body(const R& p, const Panel<typename R::Value>& panel, int64_t begin, int64_t end) {
  using T = typename R::Value;
  for (int64_t i = begin; i < end; ++i) {
    const T scale = p.scale(i);
    const T* from = p.x + i * p.columns + panel.first;
    T* into = panel.current + i * panel.padded;
    for (int64_t c = 0; c < panel.width; ++c) into[c] = scale * from[c];
    for (int64_t c = panel.width; c < panel.padded; ++c) into[c] = 0;
  }
}

template <int kBytes, class R>
LFM_INLINE void leave_rows_body(const R& p, const Panel<typename R::Value>& panel, int64_t begin, int64_t end) {
  using T = typename R::Value;
  for (int64_t i = begin; i < end; ++i) {
    const T scale = T{1} / p.scale(i);
    const T* from = panel.current + i * panel.padded;
    T* into = p.y + i * p.columns + panel.first;
    for (int64_t c = 0; c < panel.width; ++c) into[c] = scale * from[c];
  }
}

// previous = a L current + b current + c previous, for rows of kVectors vectors.
template <class V, int kVectors, class R, class T>
LFM_INLINE void step_rows(const R& p, const Panel<T>& panel, const Step<T>& step, int64_t begin, int64_t end) {
  constexpr int kLanes = sizeof(V) / sizeof(T), kWidth = kVectors * kLanes;
  constexpr int kChains = kVectors >= 4 ? 1 : 4 / kVectors;  // independent sums hide the latency of the FMA
  const Csr<T>& graph = p.graph;
  for (int64_t i = begin; i < end; ++i) {
    V sums[kChains][kVectors] = {};
    const int64_t last = graph.rowptr[i + 1];
    int64_t e = graph.rowptr[i];
    const auto add = [&](V(&into)[kVectors], int64_t edge) __attribute__((always_inline)) {
      const T* row = panel.current + static_cast<int64_t>(graph.col[edge]) * kWidth;
      for (int v = 0; v < kVectors; ++v) into[v] += graph.weight[edge] * simd::load<V>(row + v * kLanes);
    };
    for (; e + kChains <= last; e += kChains)
      for (int u = 0; u < kChains; ++u) add(sums[u], e + u);
    for (; e < last; ++e) add(sums[0], e);
    const T own = step.a * p.diagonal[i] + step.b, other = -step.a * p.left[i] * p.scale(i);
    const T* current = panel.current + i * kWidth;
    T* previous = panel.previous + i * kWidth;
    for (int v = 0; v < kVectors; ++v) {
      V sum = sums[0][v];
      for (int u = 1; u < kChains; ++u) sum += sums[u][v];
      V next = own * simd::load<V>(current + v * kLanes) + other * sum;
      if (step.c != 0) next += step.c * simd::load<V>(previous + v * kLanes);
      simd::store(previous + v * kLanes, next);
    }
  }
}

template <int kBytes, class R>
LFM_INLINE void step_range_body(const R& p, const Panel<typename R::Value>& panel, const Step<typename R::Value>& step,
                                int64_t begin, int64_t end) {
  using T = typename R::Value;
  constexpr int kLanes = simd::kLanes<T, kBytes>, kMost = static_cast<int>(kPanel<T>) / kLanes;
  using V = simd::Vec<T, kLanes>;
  // half a panel, the block of the eigensolvers, has code of its own; other widths are padded to a whole one
  if (panel.padded == kPanel<T> / 2) {
    step_rows<V, kMost / 2>(p, panel, step, begin, end);
  } else {
    step_rows<V, kMost>(p, panel, step, begin, end);
  }
}

LFM_SIMD_DISPATCH(template <class R>, void, enter_rows,
                  (const R& p, const Panel<typename R::Value>& panel, int64_t begin, int64_t end),
                  (p, panel, begin, end))
LFM_SIMD_DISPATCH(template <class R>, void, leave_rows,
                  (const R& p, const Panel<typename R::Value>& panel, int64_t begin, int64_t end),
                  (p, panel, begin, end))
LFM_SIMD_DISPATCH(template <class R>, void, step_range,
                  (const R& p, const Panel<typename R::Value>& panel, const Step<typename R::Value>& step,
                   int64_t begin, int64_t end),
                  (p, panel, step, begin, end))

// All steps of one panel over the rows that `rows(body)` goes through, each step after the one before.
template <class T, class Rows>
void run_panel(const Recurrence<T>& p, Panel<T> panel, const double* coefficients, int64_t steps, const Rows& rows) {
  rows([&](int64_t begin, int64_t end) { enter_rows(p, panel, begin, end); });
  for (int64_t k = 0; k < steps; ++k) {
    const double* abc = coefficients + 3 * k;
    // the first step has no predecessor, whose block is still unwritten
    const Step<T> step{static_cast<T>(abc[0]), static_cast<T>(abc[1]), k == 0 ? T{0} : static_cast<T>(abc[2])};
    rows([&](int64_t begin, int64_t end) { step_range(p, panel, step, begin, end); });
    std::swap(panel.previous, panel.current);
  }
  rows([&](int64_t begin, int64_t end) { leave_rows(p, panel, begin, end); });
}

template <class T>
void run(const Recurrence<T>& p, const double* coefficients, int64_t steps, int64_t graphs, T* blocks, int64_t padded) {
  const int64_t rows = p.graph.rows, panels = (p.columns + kPanel<T> - 1) / kPanel<T>;
  const auto panel_at = [&](int64_t index) {
    const int64_t first = index * kPanel<T>, width = std::min(p.columns - first, kPanel<T>);
    T* block = blocks + 2 * rows * first;
    const int64_t own = width <= kPanel<T> / 2 ? kPanel<T> / 2 : kPanel<T>;
    return Panel<T>{first, width, own, block, block + rows * own};
  };
  if (graphs * panels >= 2 * torch::stable::get_num_threads()) {
    parallel_tasks(graphs * panels, [&](int64_t task) {
      const int64_t graph = task / panels, begin = rows / graphs * graph, end = begin + rows / graphs;
      run_panel(p, panel_at(task % panels), coefficients, steps, [&](const auto& body) { body(begin, end); });
    });
    return;
  }
  for (int64_t index = 0; index < panels; ++index) {
    const Panel<T> panel = panel_at(index);
    run_panel(p, panel, coefficients, steps, [&](const auto& body) { over_rows(p.graph, panel.padded, body); });
  }
}

}  // namespace

Tensor laplacian_recurrence_cpu(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                                Tensor x, Tensor coefficients, int64_t graphs) {
  const int64_t rows = check_recurrence(rowptr, col, weight, diagonal, left, right, x, coefficients, graphs);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (rows == 0 || x.size(1) == 0) return y;
  dispatch_floating("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t padded = (x.size(1) + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
    Tensor blocks = torch::stable::new_empty(x, {2, rows, padded});
    prefer_large_pages(y);
    prefer_large_pages(blocks);
    const Csr<T> graph{rowptr.const_data_ptr<int64_t>(), col.const_data_ptr<int32_t>(), weight.const_data_ptr<T>(),
                       rows};
    const Recurrence<T> p{graph,
                          diagonal.const_data_ptr<T>(),
                          left.const_data_ptr<T>(),
                          right.const_data_ptr<T>(),
                          x.const_data_ptr<T>(),
                          y.mutable_data_ptr<T>(),
                          x.size(1)};
    run(p, coefficients.const_data_ptr<double>(), coefficients.size(0), graphs, blocks.mutable_data_ptr<T>(), padded);
  });
  return y;
}

}  // namespace lfm
