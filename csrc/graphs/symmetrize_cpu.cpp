// symmetrize_edges: from directed neighbour lists to a symmetric CSR graph, in linear time: a transposition gives the
// edges that reach each node, and sets of bits join them with the edges that leave it.
// Pattern and weights are those of `symmetrize_edges_reference`, bit for bit where no half of a weight is denormal and
// no sum of two overflows, and where under "union" no weight is negative: the larger of two is at least 0 here. Indices
// are checked (lists.h); offsets have 64 bits, and the key of an edge 32 where they suffice. Threads write to slots and
// rows that were counted out before: the result is the same for any number of threads.
#include <memory>
#include <numeric>
#include <vector>

#include "checks.h"
#include "graphs/graphs.h"
#include "graphs/lists.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace lfm {
namespace {

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

// An edge in its bucket: where it begins within its graph, and where it ends within the bucket, in one key.
template <class K, class T>
struct Edge {
  K key;
  T weight;
};

// All edges by the bucket of nodes in which they end, within a bucket in ascending order of where they begin. The
// buckets are few enough to be written to all at once, and small enough to be sorted in the cache.
template <class K, class T>
struct Buckets {
  int shift;
  int64_t rows, count;
  std::vector<int64_t> first, start;  // edges of a bucket, and of a node once its bucket is sorted
  std::unique_ptr<Edge<K, T>[]> edge;
  int64_t node(int64_t bucket) const { return std::min(rows, bucket << shift); }

  // Puts the edges of a bucket in the order of the nodes in which they end.
  void sort(int64_t bucket, std::vector<int64_t>& place, std::vector<Edge<K, T>>& sorted) {
    const Edge<K, T>*begin = edge.get() + first[bucket], *end = edge.get() + first[bucket + 1];
    const K low = (K{1} << shift) - 1;
    place.assign((size_t{1} << shift) + 1, 0);
    for (const auto* e = begin; e < end; ++e) ++place[(e->key & low) + 1];
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (int64_t i = node(bucket); i < node(bucket + 1); ++i) start[i] = first[bucket] + place[i - node(bucket)];
    sorted.resize(end - begin);
    for (const auto* e = begin; e < end; ++e) sorted[place[e->key & low]++] = *e;
    std::copy(sorted.begin(), sorted.end(), edge.get() + first[bucket]);
  }
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
  out.start.resize(rows);
  out.edge = uninitialized<Edge<K, T>>(total);
  Edge<K, T>* staged = out.edge.get();
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

// Sets of the nodes at the other ends of one node's edges: a bit each, and, where most words are empty, a bit for every
// word that is not.
struct Ends {
  bool sparse;
  std::vector<uint64_t> forward, backward, joined, used;
  std::vector<int32_t> before;  // members of `joined` in the words before
  Ends(int64_t n, int64_t k)
      : sparse(n > 128 * k),
        forward((n + 63) / 64, 0),
        backward(forward.size(), 0),
        joined(forward.size()),
        used((forward.size() + 63) / 64, 0),
        before(forward.size()) {}
};

// The edges of one node: those that leave it, and those that reach it.
template <class K, class T>
struct Row {
  using Value = T;
  const int64_t* index;
  const T* weight;
  int64_t k, base;
  const Edge<K, T>*begin, *end;
  int shift;
  int64_t from(const Edge<K, T>* e) const { return static_cast<int64_t>(e->key >> shift); }
};

// A node named twice counts once: the last of its edges. Those that reach a node come in ascending order.
template <class K, class T>
bool is_last(const Row<K, T>& row, const Edge<K, T>* e) {
  return e + 1 == row.end || e[1].key != e->key;
}

// How many edges the node has when the directions are joined.
template <class K, class T>
int64_t count_row(const Row<K, T>& row, Mode mode, Ends& ends) {
  uint64_t* forward = ends.forward.data();
  const auto holds = [forward](int64_t node) { return static_cast<int64_t>(forward[node >> 6] >> (node & 63) & 1); };
  int64_t leaving = 0, reaching = 0, mutual = 0;
  for (int64_t e = 0; e < row.k; ++e) {
    leaving += 1 - holds(row.index[e]);
    forward[row.index[e] >> 6] |= uint64_t{1} << (row.index[e] & 63);
  }
  for (const Edge<K, T>* e = row.begin; e < row.end; ++e) {
    if (!is_last(row, e)) continue;
    ++reaching;
    mutual += holds(row.from(e));
  }
  for (int64_t e = 0; e < row.k; ++e) forward[row.index[e] >> 6] = 0;
  return mode == Mode::mutual ? mutual : leaving + reaching - mutual;
}

// Writes the joined edges in ascending order, whatever order they come in: the place of a node is the number of members
// of the set before it. Nothing is sorted or merged, and all of it stays in the first cache.
template <int kBytes, class R>
LFM_INLINE void join_row_body(const R& row, Mode mode, Ends& ends, int32_t* columns, typename R::Value* values) {
  using T = typename R::Value;
  uint64_t *forward = ends.forward.data(), *backward = ends.backward.data(), *joined = ends.joined.data();
  uint64_t* used = ends.used.data();
  int32_t* before = ends.before.data();
  int32_t count = 0;
  const auto join = [&](size_t w) __attribute__((always_inline)) {
    joined[w] = mode == Mode::mutual ? forward[w] & backward[w] : forward[w] | backward[w];
    forward[w] = backward[w] = 0;
    before[w] = count;
    count += __builtin_popcountll(joined[w]);
  };
  const auto insert = [](uint64_t* set, int64_t node)
                          __attribute__((always_inline)) { set[node >> 6] |= uint64_t{1} << (node & 63); };
  for (int64_t e = 0; e < row.k; ++e) insert(forward, row.index[e]);
  for (const auto* e = row.begin; e < row.end; ++e) insert(backward, row.from(e));
  if (ends.sparse) {
    for (int64_t e = 0; e < row.k; ++e) insert(used, row.index[e] >> 6);
    for (const auto* e = row.begin; e < row.end; ++e) insert(used, row.from(e) >> 6);
    for (size_t u = 0; u < ends.used.size(); ++u) {
      for (uint64_t bits = used[u]; bits; bits &= bits - 1) join(u * 64 + __builtin_ctzll(bits));
      used[u] = 0;
    }
  } else {
    for (size_t w = 0; w < ends.forward.size(); ++w) join(w);
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
  for (const auto* e = row.begin; e < row.end; ++e) {
    if (!is_last(row, e)) continue;
    visit(row.from(e), [&](int64_t at) __attribute__((always_inline)) {
      columns[at] = static_cast<int32_t>(row.base + row.from(e));
      // a mean is the sum of halves, which are exact
      values[at] = mode == Mode::mean ? values[at] + e->weight / 2 : combine(mode, values[at], e->weight);
    });
  }
}

LFM_SIMD_DISPATCH(template <class R>, void, join_row,
                  (const R& row, Mode mode, Ends& ends, int32_t* columns, typename R::Value* values),
                  (row, mode, ends, columns, values))

template <class K, class T>
std::tuple<Tensor, Tensor, Tensor> symmetrize(const Tensor& indices, const Tensor& weights, Mode mode, int shift) {
  const int64_t n = indices.size(1), k = indices.size(2), rows = indices.size(0) * n;
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const T* weight = weights.const_data_ptr<T>();
  Buckets<K, T> buckets = stage<K, T>(index, weight, rows, n, k, shift);

  Tensor rowptr = torch::stable::new_empty(indices, {rows + 1});
  int64_t* pointer = rowptr.mutable_data_ptr<int64_t>();
  pointer[0] = 0;
  // body(number of a row, row, ends) for all rows; a few buckets a task, which share what they need. The first time
  // over sorts each bucket just before its rows are read, while it is in the cache.
  const int64_t tasks = std::min<int64_t>(buckets.count, torch::stable::get_num_threads() * 16);
  const auto over_rows = [&](bool first_time, const auto& body) {
    parallel_tasks(tasks, [&](int64_t task) {
      Ends ends(n, k);
      const Edge<K, T>* edge = buckets.edge.get();
      std::vector<int64_t> place;
      std::vector<Edge<K, T>> sorted;
      for (int64_t b = buckets.count * task / tasks; b < buckets.count * (task + 1) / tasks; ++b) {
        if (first_time) buckets.sort(b, place, sorted);
        for (int64_t i = buckets.node(b); i < buckets.node(b + 1); ++i) {
          const int64_t end = i + 1 < buckets.node(b + 1) ? buckets.start[i + 1] : buckets.first[b + 1];
          body(i, Row<K, T>{index + i * k, weight + i * k, k, i / n * n, edge + buckets.start[i], edge + end, shift},
               ends);
        }
      }
    });
  };
  over_rows(true, [&](int64_t i, const Row<K, T>& row, Ends& ends) { pointer[i + 1] = count_row(row, mode, ends); });
  std::partial_sum(pointer, pointer + rows + 1, pointer);
  Tensor col = torch::stable::new_empty(indices, {pointer[rows]}, ScalarType::Int);
  Tensor value = torch::stable::new_empty(weights, {pointer[rows]});
  int32_t* columns = col.mutable_data_ptr<int32_t>();
  T* values = value.mutable_data_ptr<T>();
  prefer_large_pages(col);
  prefer_large_pages(value);
  over_rows(false, [&](int64_t i, const Row<K, T>& row, Ends& ends) {
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor> symmetrize_edges_cpu(Tensor indices, Tensor weights, std::string mode) {
  check_lists(indices, weights);
  check_indices_in_range(indices);
  const Mode how = mode_of(mode);
  return weights.scalar_type() == ScalarType::Float ? symmetrize<float>(indices, weights, how)
                                                    : symmetrize<double>(indices, weights, how);
}

}  // namespace lfm
