// From directed neighbour lists to a symmetric CSR graph, in linear time: a transposition gives the edges that reach
// each node, and sets of bits join them with the edges that leave it.
#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

#include "checks.h"
#include "graph/graph.h"
#include "memory.h"
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
struct Lists {  // CSR
  std::vector<int64_t> start;
  std::unique_ptr<Edge<T>[]> edge;
};

template <class T>
struct StagedEdge {
  int32_t from, to;  // from: within its graph; to: over the batch
  T weight;
};

// For every node the edges that end in it, in ascending order of where they begin. Edges go to buckets of nodes first,
// few enough to write to all at once, and within a bucket, which fits in the cache, to their places. Each worker owns a
// range of rows and, per bucket, a range of the slots, so that the order does not depend on the number of workers.
template <class T>
Lists<T> transpose(const int64_t* index, const T* weight, int64_t rows, int64_t n, int64_t k) {
  const int64_t workers =
      std::max<int64_t>(1, std::min<int64_t>({torch::stable::get_num_threads(), 64, rows * k >> 14}));
  const auto first_row = [&](int64_t worker) { return rows * worker / workers; };
  int shift = 5;
  while (rows >> shift > 512) ++shift;
  const int64_t buckets = (rows >> shift) + 1;
  std::vector<std::vector<int64_t>> slots(workers);
  parallel_tasks(workers, [&](int64_t worker) {
    auto& count = slots[worker];
    count.assign(buckets, 0);
    for (int64_t i = first_row(worker); i < first_row(worker + 1); ++i) {
      const int64_t base = i / n * n;
      for (int64_t e = i * k; e < (i + 1) * k; ++e) ++count[(base + index[e]) >> shift];
    }
  });
  std::vector<int64_t> first(buckets + 1);
  int64_t total = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    first[bucket] = total;
    for (auto& count : slots) {
      const int64_t own = count[bucket];
      count[bucket] = total;
      total += own;
    }
  }
  first[buckets] = total;
  const std::unique_ptr<StagedEdge<T>[]> staged = uninitialized<StagedEdge<T>>(total);
  Lists<T> out;
  out.start.resize(rows + 1);
  out.start[rows] = total;
  out.edge = uninitialized<Edge<T>>(total);
  parallel_tasks(workers, [&](int64_t worker) {
    int64_t* slot = slots[worker].data();
    for (int64_t i = first_row(worker); i < first_row(worker + 1); ++i) {
      const int64_t base = i / n * n;
      for (int64_t e = i * k; e < (i + 1) * k; ++e) {
        const int64_t to = base + index[e];
        staged[slot[to >> shift]++] = {static_cast<int32_t>(i - base), static_cast<int32_t>(to), weight[e]};
      }
    }
  });
  parallel_tasks(buckets, [&](int64_t bucket) {
    const int64_t node = bucket << shift, nodes = std::min(rows - node, int64_t{1} << shift);
    if (nodes <= 0) return;
    std::vector<int64_t> place(nodes, 0);
    for (int64_t e = first[bucket]; e < first[bucket + 1]; ++e) ++place[staged[e].to - node];
    int64_t next = first[bucket];
    for (int64_t j = 0; j < nodes; ++j) {
      out.start[node + j] = next;
      next += place[j];
      place[j] = out.start[node + j];
    }
    for (int64_t e = first[bucket]; e < first[bucket + 1]; ++e)
      out.edge[place[staged[e].to - node]++] = {staged[e].from, staged[e].weight};
  });
  return out;
}

// Sets of nodes of one graph: a bit each, and a bit for every word of them that is not empty.
class NodeSet {
 public:
  explicit NodeSet(int64_t n) : word_((n + 63) / 64, 0), used_((word_.size() + 63) / 64, 0) {}
  void insert(int64_t node) {
    word_[node >> 6] |= uint64_t{1} << (node & 63);
    used_[node >> 12] |= uint64_t{1} << (node >> 6 & 63);
  }
  // Calls visit(first node of a word, this word, the other's word) for the words that are not empty in one of the two,
  // and empties both.
  template <class Visit>
  static void drain(NodeSet& a, NodeSet& b, const Visit& visit) {
    for (size_t u = 0; u < a.used_.size(); ++u) {
      for (uint64_t bits = a.used_[u] | b.used_[u]; bits; bits &= bits - 1) {
        const size_t w = u * 64 + __builtin_ctzll(bits);
        visit(static_cast<int64_t>(w) * 64, a.word_[w], b.word_[w]);
        a.word_[w] = b.word_[w] = 0;
      }
      a.used_[u] = b.used_[u] = 0;
    }
  }

 private:
  std::vector<uint64_t> word_, used_;
};

// Weights of the edges that leave one node and that reach it, by the node at their other end.
template <class T>
struct Ends {
  NodeSet forward, backward;
  std::vector<T> to, from;
  explicit Ends(int64_t n) : forward(n), backward(n), to(n), from(n) {}
};

constexpr int64_t kRowsPerTask = 256;

// Columns come out of the sets of nodes in ascending order, whatever order they go in: nothing is sorted or merged.
template <class T>
std::tuple<Tensor, Tensor, Tensor> symmetrize(const Tensor& indices, const Tensor& weights, Mode mode) {
  const int64_t n = indices.size(1), k = indices.size(2), rows = indices.size(0) * n;
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const T* weight = weights.const_data_ptr<T>();
  const Lists<T> lists = transpose<T>(index, weight, rows, n, k);

  Tensor rowptr = torch::stable::new_empty(indices, {rows + 1});
  int64_t* pointer = rowptr.mutable_data_ptr<int64_t>();
  pointer[0] = 0;
  // the sets take memory for all nodes: as many rows a task as make up for it
  const int64_t rows_per_task = std::max(kRowsPerTask, n / 32), tasks = (rows + rows_per_task - 1) / rows_per_task;
  const auto over_rows = [&](const auto& body) {
    parallel_tasks(tasks, [&](int64_t task) {
      Ends<T> ends(n);
      for (int64_t i = task * rows_per_task; i < std::min(rows, (task + 1) * rows_per_task); ++i) body(i, ends);
    });
  };
  const auto wanted = [mode](uint64_t forward, uint64_t backward) {
    return mode == Mode::mutual ? forward & backward : forward | backward;
  };
  over_rows([&](int64_t i, Ends<T>& ends) {
    for (int64_t e = i * k; e < (i + 1) * k; ++e) ends.forward.insert(index[e]);
    for (int64_t e = lists.start[i]; e < lists.start[i + 1]; ++e) ends.backward.insert(lists.edge[e].node);
    int64_t count = 0;
    NodeSet::drain(ends.forward, ends.backward, [&](int64_t, uint64_t forward, uint64_t backward) {
      count += __builtin_popcountll(wanted(forward, backward));
    });
    pointer[i + 1] = count;
  });
  std::partial_sum(pointer, pointer + rows + 1, pointer);
  Tensor col = torch::stable::new_empty(indices, {pointer[rows]}, ScalarType::Int);
  Tensor value = torch::stable::new_empty(weights, {pointer[rows]});
  int32_t* columns = col.mutable_data_ptr<int32_t>();
  T* values = value.mutable_data_ptr<T>();
  prefer_large_pages(columns, pointer[rows]);
  prefer_large_pages(values, pointer[rows]);
  over_rows([&](int64_t i, Ends<T>& ends) {
    const int64_t base = i / n * n;
    for (int64_t e = i * k; e < (i + 1) * k; ++e) {
      ends.forward.insert(index[e]);
      ends.to[index[e]] = weight[e];
    }
    for (int64_t e = lists.start[i]; e < lists.start[i + 1]; ++e) {
      ends.backward.insert(lists.edge[e].node);
      ends.from[lists.edge[e].node] = lists.edge[e].weight;
    }
    int64_t at = pointer[i];
    NodeSet::drain(ends.forward, ends.backward, [&](int64_t first, uint64_t forward, uint64_t backward) {
      for (uint64_t bits = wanted(forward, backward); bits; bits &= bits - 1) {
        const int64_t j = first + __builtin_ctzll(bits);
        columns[at] = static_cast<int32_t>(base + j);
        values[at++] = combine(mode, ends.to[j], ends.from[j]);
      }
      // an absent direction weighs nothing
      for (uint64_t bits = forward | backward; bits; bits &= bits - 1) {
        const int64_t j = first + __builtin_ctzll(bits);
        ends.to[j] = ends.from[j] = T(0);
      }
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
  constexpr int64_t kChunk = 1 << 16;
  const int64_t n = indices.size(1), entries = indices.numel(), *index = indices.const_data_ptr<int64_t>();
  std::atomic<bool> wrong{false};
  parallel_tasks((entries + kChunk - 1) / kChunk, [&](int64_t chunk) {
    uint64_t largest = 0;  // a negative index is larger than any
    for (int64_t e = chunk * kChunk; e < std::min(entries, (chunk + 1) * kChunk); ++e)
      largest = std::max(largest, static_cast<uint64_t>(index[e]));
    if (entries > 0 && largest >= static_cast<uint64_t>(n)) wrong = true;
  });
  if (!wrong) return;
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
