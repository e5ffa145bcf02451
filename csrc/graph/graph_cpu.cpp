// From directed neighbour lists to a symmetric CSR graph, in linear time: transposing a CSR matrix sorts its rows, so
// two transpositions give both orientations of every edge in sorted order, and one merge combines them.
#include <memory>
#include <numeric>
#include <vector>

#include "checks.h"
#include "graph/graph.h"
#include "parallel.h"

namespace lfm {
namespace {

enum class Mode { mean, union_, mutual };

Mode mode_of(const std::string& mode) {
  if (mode == "mean") return Mode::mean;
  if (mode == "union") return Mode::union_;
  LFM_CHECK(mode == "mutual", "mode must be one of 'mean', 'union', 'mutual', got '", mode, "'");
  return Mode::mutual;
}

// W_ij combined from the two directions; an absent one is 0.
template <class T>
T combine(Mode mode, T forward, T backward) {
  switch (mode) {
    case Mode::mean:
      return (forward + backward) / 2;
    case Mode::union_:
      return std::max(forward, backward);
    default:
      return std::min(forward, backward);
  }
}

template <class T>
struct Edge {  // together: a transposition writes to one place instead of two
  int32_t node;
  T weight;
};

template <class T>
struct Lists {  // CSR with columns in ascending order
  std::vector<int64_t> start;
  std::unique_ptr<Edge<T>[]> edge;
};

// Transposes the matrix whose row i holds entries start(i) to start(i + 1), columns numbered from first(i). Each worker
// owns a range of rows and, per column, a range of the slots, so that columns come out sorted whatever the number of
// workers.
template <class T, class Start, class First, class EdgeAt>
Lists<T> transpose(int64_t rows, int64_t entries, const Start& start, const First& first, const EdgeAt& edge) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>({torch::stable::get_num_threads(), 8, entries >> 14}));
  const auto first_row = [&](int64_t worker) { return rows * worker / workers; };
  std::vector<std::vector<int64_t>> slots(workers);
  parallel_tasks(workers, [&](int64_t worker) {
    auto& count = slots[worker];
    count.assign(rows, 0);
    for (int64_t i = first_row(worker); i < first_row(worker + 1); ++i) {
      int64_t* own = count.data() + first(i);
      for (int64_t e = start(i); e < start(i + 1); ++e) ++own[edge(e).node];
    }
  });
  Lists<T> out;
  out.start.resize(rows + 1);
  int64_t total = 0;
  for (int64_t j = 0; j < rows; ++j) {
    out.start[j] = total;
    for (auto& count : slots) {
      const int64_t own = count[j];
      count[j] = total;
      total += own;
    }
  }
  out.start[rows] = total;
  out.edge.reset(new Edge<T>[entries]);  // left as it is: every entry is written below
  parallel_tasks(workers, [&](int64_t worker) {
    for (int64_t i = first_row(worker); i < first_row(worker + 1); ++i) {
      int64_t* slot = slots[worker].data() + first(i);
      for (int64_t e = start(i); e < start(i + 1); ++e) {
        const Edge<T> old = edge(e);
        out.edge[slot[old.node]++] = {static_cast<int32_t>(i), old.weight};
      }
    }
  });
  return out;
}

// Calls emit(column, forward, backward, both) for the union of two sorted lists.
template <class T, class Emit>
void merge(const Lists<T>& forward, const Lists<T>& backward, int64_t row, const Emit& emit) {
  int64_t f = forward.start[row], b = backward.start[row];
  const int64_t f_end = forward.start[row + 1], b_end = backward.start[row + 1];
  const Edge<T> none{INT32_MAX, T(0)};
  while (f < f_end || b < b_end) {
    const Edge<T> to = f < f_end ? forward.edge[f] : none, from = b < b_end ? backward.edge[b] : none;
    const bool has_f = to.node <= from.node, has_b = from.node <= to.node;
    emit(std::min(to.node, from.node), has_f ? to.weight : T(0), has_b ? from.weight : T(0), has_f && has_b);
    f += has_f;
    b += has_b;
  }
}

constexpr int64_t kRowsPerTask = 256;

template <class T>
std::tuple<Tensor, Tensor, Tensor> symmetrize(const Tensor& indices, const Tensor& weights, Mode mode) {
  const int64_t n = indices.size(1), k = indices.size(2), rows = indices.size(0) * n, entries = rows * k;
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const T* weight = weights.const_data_ptr<T>();
  const Lists<T> backward = transpose<T>(
      rows, entries, [k](int64_t i) { return i * k; }, [n](int64_t i) { return i / n * n; },
      [=](int64_t e) { return Edge<T>{static_cast<int32_t>(index[e]), weight[e]}; });
  const Lists<T> forward = transpose<T>(
      rows, entries, [&](int64_t i) { return backward.start[i]; }, [](int64_t) { return int64_t{0}; },
      [&](int64_t e) { return backward.edge[e]; });

  Tensor rowptr = torch::stable::new_empty(indices, {rows + 1});
  int64_t* pointer = rowptr.mutable_data_ptr<int64_t>();
  pointer[0] = 0;
  const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const auto over_rows = [&](const auto& body) {
    parallel_tasks(tasks, [&](int64_t task) {
      for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) body(i);
    });
  };
  over_rows([&](int64_t i) {
    int64_t count = 0;
    merge(forward, backward, i, [&](int32_t, T, T, bool both) { count += mode != Mode::mutual || both; });
    pointer[i + 1] = count;
  });
  std::partial_sum(pointer, pointer + rows + 1, pointer);
  Tensor col = torch::stable::new_empty(indices, {pointer[rows]}, ScalarType::Int);
  Tensor value = torch::stable::new_empty(weights, {pointer[rows]});
  int32_t* columns = col.mutable_data_ptr<int32_t>();
  T* values = value.mutable_data_ptr<T>();
  over_rows([&](int64_t i) {
    int64_t at = pointer[i];
    merge(forward, backward, i, [&](int32_t j, T f, T b, bool both) {
      if (mode == Mode::mutual && !both) return;
      columns[at] = j;
      values[at++] = combine(mode, f, b);
    });
  });
  return {rowptr, col, value};
}

template <class T>
void symmetrize_backward(const Tensor& indices, const Tensor& weights, const Tensor& rowptr, const Tensor& col,
                         const Tensor& grad, Mode mode, T* out) {
  const int64_t n = indices.size(1), k = indices.size(2), rows = indices.size(0) * n;
  const int64_t *index = indices.const_data_ptr<int64_t>(), *pointer = rowptr.const_data_ptr<int64_t>();
  const int32_t* columns = col.const_data_ptr<int32_t>();
  const T *weight = weights.const_data_ptr<T>(), *g = grad.const_data_ptr<T>();
  const auto grad_at = [&](int64_t i, int64_t j) {
    const int32_t *end = columns + pointer[i + 1], *at = std::lower_bound(columns + pointer[i], end, j);
    return at != end && *at == j ? g[at - columns] : T(0);
  };
  parallel_tasks((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) {
      const int64_t base = i / n * n;
      for (int64_t e = i * k; e < (i + 1) * k; ++e) {
        const int64_t j = base + index[e];
        const T both = grad_at(i, j) + grad_at(j, i);
        if (mode == Mode::mean) {
          out[e] = both / 2;
          continue;
        }
        const int64_t *list = index + j * k, *reverse = std::find(list, list + k, i - base);
        T share = mode == Mode::union_ ? T(1) : T(0);
        if (reverse != list + k) {
          const T other = weight[reverse - index];
          const bool better = mode == Mode::union_ ? weight[e] > other : weight[e] < other;
          share = weight[e] == other ? T(0.5) : T(better);
        }
        out[e] = share * both;
      }
    }
  });
}

void check_lists(const Tensor& indices, const Tensor& weights) {
  check_dim("indices", indices, 3);
  check_dtype("indices", indices, ScalarType::Long, "int64");
  check_contiguous("indices", indices);
  check_dim("weights", weights, 3);
  for (int64_t dim = 0; dim < 3; ++dim) check_size("weights", weights, dim, indices.size(dim));
  check_contiguous("weights", weights);
  check_floating("weights", weights);
  const int64_t rows = indices.size(0) * indices.size(1);
  LFM_CHECK(rows <= INT32_MAX, "indices must number at most 2^31 - 1 nodes over the batch, got ", rows);
}

// A wrong index would be a write out of bounds; the scan costs little beside the transposition.
void check_indices_in_range(const Tensor& indices) {
  const int64_t n = indices.size(1), entries = indices.numel(), *index = indices.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < entries; ++e)
    LFM_CHECK(index[e] >= 0 && index[e] < n, "indices must lie in [0, ", n, "), got ", index[e]);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> symmetrize_edges_cpu(Tensor indices, Tensor weights, std::string mode) {
  check_lists(indices, weights);
  check_indices_in_range(indices);
  const Mode how = mode_of(mode);
  return weights.scalar_type() == ScalarType::Float ? symmetrize<float>(indices, weights, how)
                                                    : symmetrize<double>(indices, weights, how);
}

Tensor symmetrize_edges_backward_cpu(Tensor indices, Tensor weights, Tensor rowptr, Tensor col, Tensor grad,
                                     std::string mode) {
  check_lists(indices, weights);
  check_indices_in_range(indices);
  check_csr(rowptr, col);
  check_size("rowptr", rowptr, 0, indices.size(0) * indices.size(1) + 1);
  check_like("grad", grad, "weights", weights);
  check_dim("grad", grad, 1);
  check_size("grad", grad, 0, col.size(0));
  check_contiguous("grad", grad);
  const Mode how = mode_of(mode);
  Tensor out = torch::stable::new_empty(weights, weights.sizes());
  dispatch_floating("weights", weights, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    symmetrize_backward<T>(indices, weights, rowptr, col, grad, how, out.mutable_data_ptr<T>());
  });
  return out;
}

// Depth-first search. Once every node has been reached the remaining edges cannot change anything, so on the connected
// graphs that are the rule only a small part of the edges is read.
Tensor connected_components_cpu(Tensor rowptr, Tensor col) {
  check_csr(rowptr, col);
  const int64_t rows = rowptr.size(0) - 1;
  Tensor labels = torch::stable::new_empty(rowptr, {rows});
  int64_t* label = labels.mutable_data_ptr<int64_t>();
  const int64_t* pointer = rowptr.const_data_ptr<int64_t>();
  const int32_t* columns = col.const_data_ptr<int32_t>();
  std::fill(label, label + rows, -1);
  std::vector<int64_t> stack;
  int64_t reached = 0, component = 0;
  for (int64_t seed = 0; seed < rows && reached < rows; ++seed) {
    if (label[seed] >= 0) continue;
    label[seed] = component;
    ++reached;
    stack.assign(1, seed);
    while (!stack.empty() && reached < rows) {
      const int64_t i = stack.back();
      stack.pop_back();
      for (int64_t e = pointer[i]; e < pointer[i + 1]; ++e) {
        const int64_t j = columns[e];
        if (label[j] >= 0) continue;
        label[j] = component;
        ++reached;
        stack.push_back(j);
      }
    }
    ++component;
  }
  return labels;
}

}  // namespace lfm
