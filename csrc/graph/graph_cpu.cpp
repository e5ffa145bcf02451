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
#include "simd.h"

namespace lfm {
namespace {

constexpr int64_t kRowsPerTask = 256;

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
struct Edge {
  int32_t node;
  T weight;
};

// An edge on its way to its bucket: where it begins within its graph, and where it ends within the bucket, in one key.
template <class K, class T>
struct StagedEdge {
  K key;
  T weight;
};

// All edges by the bucket of nodes in which they end, within a bucket in ascending order of where they begin. The
// buckets are few enough to be written to all at once, and small enough to be sorted in the cache.
template <class K, class T>
struct Buckets {
  using Key = K;
  int shift;
  int64_t rows, count;
  std::vector<int64_t> first;
  std::unique_ptr<StagedEdge<K, T>[]> edge;
  int64_t node(int64_t bucket) const { return std::min(rows, bucket << shift); }
};

// Each worker owns a range of rows and, per bucket, a range of the slots, so that the order does not depend on the
// number of workers.
template <class K, class T>
Buckets<K, T> stage(const int64_t* index, const T* weight, int64_t rows, int64_t n, int64_t k, int shift) {
  const int64_t workers =
      std::max<int64_t>(1, std::min<int64_t>({torch::stable::get_num_threads(), 64, rows * k >> 14}));
  const auto first_row = [&](int64_t worker) { return rows * worker / workers; };
  Buckets<K, T> out;
  out.shift = shift;
  out.rows = rows;
  out.count = (rows >> shift) + 1;
  std::vector<std::vector<int64_t>> slots(workers);
  parallel_tasks(workers, [&](int64_t worker) {
    auto& count = slots[worker];
    count.assign(out.count, 0);
    for (int64_t i = first_row(worker); i < first_row(worker + 1); ++i) {
      const int64_t base = i / n * n;
      for (int64_t e = i * k; e < (i + 1) * k; ++e) ++count[(base + index[e]) >> shift];
    }
  });
  out.first.resize(out.count + 1);
  int64_t total = 0;
  for (int64_t bucket = 0; bucket < out.count; ++bucket) {
    out.first[bucket] = total;
    for (auto& count : slots) {
      const int64_t own = count[bucket];
      count[bucket] = total;
      total += own;
    }
  }
  out.first[out.count] = total;
  out.edge = uninitialized<StagedEdge<K, T>>(total);
  StagedEdge<K, T>* staged = out.edge.get();
  parallel_tasks(workers, [&](int64_t worker) {
    int64_t* slot = slots[worker].data();
    for (int64_t i = first_row(worker); i < first_row(worker + 1); ++i) {
      const int64_t base = i / n * n;
      for (int64_t e = i * k; e < (i + 1) * k; ++e) {
        const int64_t to = base + index[e];
        const int64_t key = (i - base) << shift | (to & ((int64_t{1} << shift) - 1));
        staged[slot[to >> shift]++] = {static_cast<K>(key), weight[e]};
      }
    }
  });
  return out;
}

// The edges that end in the nodes of one bucket, node by node.
template <class T>
struct Incoming {
  std::vector<int64_t> start, place;
  std::vector<Edge<T>> edge;

  template <class B>
  void sort(const B& buckets, int64_t bucket) {
    const int64_t nodes = buckets.node(bucket + 1) - buckets.node(bucket);
    const auto *begin = buckets.edge.get() + buckets.first[bucket],
               *end = buckets.edge.get() + buckets.first[bucket + 1];
    const typename B::Key low = (typename B::Key{1} << buckets.shift) - 1;
    start.assign(nodes + 1, 0);
    for (const auto* e = begin; e < end; ++e) ++start[(e->key & low) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    place.assign(start.begin(), start.end());
    edge.resize(end - begin);
    for (const auto* e = begin; e < end; ++e)
      edge[place[e->key & low]++] = {static_cast<int32_t>(e->key >> buckets.shift), e->weight};
  }
};

// What a task needs: the edges that reach the nodes of a bucket, and for one node sets of the nodes at the other ends:
// a bit each, and a bit for every word of them that is not empty.
template <class T>
struct Ends {
  Incoming<T> incoming;
  std::vector<uint64_t> forward, backward, joined, used;
  std::vector<int32_t> before;  // members of `joined` in the words before
  explicit Ends(int64_t n)
      : forward((n + 63) / 64, 0),
        backward(forward.size(), 0),
        joined(forward.size()),
        used((forward.size() + 63) / 64, 0),
        before(forward.size()) {}
};

// The edges of one node: those that leave it, and those that reach it.
template <class T>
struct Row {
  const int64_t* index;
  const T* weight;
  int64_t k, base;
  const Edge<T>*begin, *end;
};

// A node named twice counts once: the last of its edges. Those that reach a node come in ascending order.
template <class T>
bool is_last(const Row<T>& row, const Edge<T>* e) {
  return e + 1 == row.end || e[1].node != e->node;
}

// How many edges the node has when the directions are joined.
template <class T>
int64_t count_row(const Row<T>& row, Mode mode, Ends<T>& ends) {
  uint64_t* forward = ends.forward.data();
  const auto holds = [forward](int64_t node) { return static_cast<int64_t>(forward[node >> 6] >> (node & 63) & 1); };
  int64_t leaving = 0, reaching = 0, mutual = 0;
  for (int64_t e = 0; e < row.k; ++e) {
    leaving += 1 - holds(row.index[e]);
    forward[row.index[e] >> 6] |= uint64_t{1} << (row.index[e] & 63);
  }
  for (const Edge<T>* e = row.begin; e < row.end; ++e) {
    if (!is_last(row, e)) continue;
    ++reaching;
    mutual += holds(e->node);
  }
  for (int64_t e = 0; e < row.k; ++e) forward[row.index[e] >> 6] = 0;
  return mode == Mode::mutual ? mutual : leaving + reaching - mutual;
}

// Writes the joined edges in ascending order, whatever order they come in: the place of a node is the number of members
// of the set before it. Nothing is sorted or merged, and all of it stays in the first cache.
template <int kBytes, class T>
LFM_INLINE void join_row_body(const Row<T>& row, Mode mode, Ends<T>& ends, int32_t* columns, T* values) {
  uint64_t *forward = ends.forward.data(), *backward = ends.backward.data(), *joined = ends.joined.data();
  uint64_t* used = ends.used.data();
  int32_t* before = ends.before.data();
  const auto insert = [used](uint64_t* set, int64_t node) __attribute__((always_inline)) {
    set[node >> 6] |= uint64_t{1} << (node & 63);
    used[node >> 12] |= uint64_t{1} << (node >> 6 & 63);
  };
  for (int64_t e = 0; e < row.k; ++e) insert(forward, row.index[e]);
  for (const Edge<T>* e = row.begin; e < row.end; ++e) insert(backward, e->node);
  int32_t count = 0;
  for (size_t u = 0; u < ends.used.size(); ++u) {
    for (uint64_t bits = used[u]; bits; bits &= bits - 1) {
      const size_t w = u * 64 + __builtin_ctzll(bits);
      joined[w] = mode == Mode::mutual ? forward[w] & backward[w] : forward[w] | backward[w];
      forward[w] = backward[w] = 0;
      before[w] = count;
      count += __builtin_popcountll(joined[w]);
    }
    used[u] = 0;
  }
  for (int32_t at = 0; at < count; ++at) values[at] = 0;
  // calls write(place) for a member, and for no one else
  const auto visit = [&](int64_t node, const auto& write) __attribute__((always_inline)) {
    const uint64_t word = joined[node >> 6], bit = uint64_t{1} << (node & 63);
    if (mode == Mode::mutual && !(word & bit)) return;
    write(before[node >> 6] + __builtin_popcountll(word & (bit - 1)));
  };
  for (int64_t e = 0; e < row.k; ++e)
    visit(row.index[e], [&](int64_t at) __attribute__((always_inline)) {
      columns[at] = static_cast<int32_t>(row.base + row.index[e]);
      values[at] = combine(mode, row.weight[e], mode == Mode::mutual ? row.weight[e] : T(0));
    });
  for (const Edge<T>* e = row.begin; e < row.end; ++e) {
    if (!is_last(row, e)) continue;
    visit(e->node, [&](int64_t at) __attribute__((always_inline)) {
      columns[at] = static_cast<int32_t>(row.base + e->node);
      // a mean is the sum of halves, which are exact
      values[at] = mode == Mode::mean ? values[at] + e->weight / 2 : combine(mode, values[at], e->weight);
    });
  }
}

LFM_SIMD_DISPATCH(template <class T>, void, join_row,
                  (const Row<T>& row, Mode mode, Ends<T>& ends, int32_t* columns, T* values),
                  (row, mode, ends, columns, values))

template <class K, class T>
std::tuple<Tensor, Tensor, Tensor> symmetrize(const Tensor& indices, const Tensor& weights, Mode mode, int shift) {
  const int64_t n = indices.size(1), k = indices.size(2), rows = indices.size(0) * n;
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const T* weight = weights.const_data_ptr<T>();
  const Buckets<K, T> buckets = stage<K, T>(index, weight, rows, n, k, shift);

  Tensor rowptr = torch::stable::new_empty(indices, {rows + 1});
  int64_t* pointer = rowptr.mutable_data_ptr<int64_t>();
  pointer[0] = 0;
  // body(number of a row, row, ends) for all rows; a few buckets a task, which share what they need
  const int64_t tasks = std::min<int64_t>(buckets.count, torch::stable::get_num_threads() * 16);
  const auto over_rows = [&](const auto& body) {
    parallel_tasks(tasks, [&](int64_t task) {
      Ends<T> ends(n);
      const Incoming<T>& incoming = ends.incoming;
      for (int64_t b = buckets.count * task / tasks; b < buckets.count * (task + 1) / tasks; ++b) {
        ends.incoming.sort(buckets, b);
        for (int64_t i = buckets.node(b); i < buckets.node(b + 1); ++i) {
          const int64_t* start = incoming.start.data() + (i - buckets.node(b));
          const Edge<T>* edge = incoming.edge.data();
          body(i, Row<T>{index + i * k, weight + i * k, k, i / n * n, edge + start[0], edge + start[1]}, ends);
        }
      }
    });
  };
  over_rows([&](int64_t i, const Row<T>& row, Ends<T>& ends) { pointer[i + 1] = count_row(row, mode, ends); });
  std::partial_sum(pointer, pointer + rows + 1, pointer);
  Tensor col = torch::stable::new_empty(indices, {pointer[rows]}, ScalarType::Int);
  Tensor value = torch::stable::new_empty(weights, {pointer[rows]});
  int32_t* columns = col.mutable_data_ptr<int32_t>();
  T* values = value.mutable_data_ptr<T>();
  prefer_large_pages(col);
  prefer_large_pages(value);
  over_rows([&](int64_t i, const Row<T>& row, Ends<T>& ends) {
    join_row(row, mode, ends, columns + pointer[i], values + pointer[i]);
  });
  return {rowptr, col, value};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> symmetrize(const Tensor& indices, const Tensor& weights, Mode mode) {
  const int64_t n = indices.size(1), rows = indices.size(0) * n;
  int shift = 5;
  while (rows >> shift > 512) ++shift;
  return n <= (int64_t{1} << 32) >> shift ? symmetrize<uint32_t, T>(indices, weights, mode, shift)
                                          : symmetrize<uint64_t, T>(indices, weights, mode, shift);
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
