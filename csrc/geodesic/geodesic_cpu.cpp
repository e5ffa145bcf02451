// geodesics for the descriptors: shortest paths from several sources, one Dijkstra with a binary heap per source,
// sources shared out over the threads, each of which writes a column of its own.
// The same bits as `geodesics_reference`: rounded addition is monotone, so the smallest path sum is one and the same
// number whatever the order of relaxation.
// Sources, columns and the signs of the lengths are checked first; that rowptr ascends to nnz is taken for granted.
// Nodes fit 32 bits, offsets have 64.
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "checks.h"
#include "geodesic/geodesic.h"
#include "parallel.h"

namespace lfm {
namespace {

template <class T>
struct Paths {
  const int64_t* rowptr;
  const int32_t* col;
  const T* length;
  int64_t nodes, sources;  // of one graph
};

// Writes the distances of graph `graph` to its source number `index` into column `index` of out [nodes, sources].
template <class T>
void dijkstra(const Paths<T>& p, int64_t graph, int64_t source, int64_t index, T* out) {
  const int64_t first = graph * p.nodes;
  std::vector<T> distance(p.nodes, std::numeric_limits<T>::infinity());
  std::vector<std::pair<T, int32_t>> heap{{T(0), static_cast<int32_t>(source)}};
  const std::greater<std::pair<T, int32_t>> later;
  distance[source] = 0;
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const auto [reached, node] = heap.back();
    heap.pop_back();
    if (reached > distance[node]) continue;  // a shorter way was found after this entry was pushed
    for (int64_t e = p.rowptr[first + node]; e < p.rowptr[first + node + 1]; ++e) {
      const int32_t next = static_cast<int32_t>(p.col[e] - first);
      const T way = reached + p.length[e];
      if (way >= distance[next]) continue;
      distance[next] = way;
      heap.emplace_back(way, next);
      std::push_heap(heap.begin(), heap.end(), later);
    }
  }
  T* column = out + first * p.sources + index;
  for (int64_t i = 0; i < p.nodes; ++i) column[i * p.sources] = distance[i];
}

// A wrong column would be an access out of bounds, a negative length an endless walk.
template <class T>
void check_edges(const Paths<T>& p, int64_t rows) {
  LFM_CHECK(p.rowptr[0] == 0, "rowptr must start at 0, got ", p.rowptr[0]);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = i / p.nodes * p.nodes;
    for (int64_t e = p.rowptr[i]; e < p.rowptr[i + 1]; ++e) {
      LFM_CHECK(p.col[e] >= first && p.col[e] < first + p.nodes, "col must stay within a graph of ", p.nodes,
                " nodes, got ", p.col[e], " in row ", i);
      LFM_CHECK(p.length[e] >= 0, "length must not be negative or NaN, got ", p.length[e], " in row ", i);
    }
  }
}

}  // namespace

Tensor geodesics_cpu(Tensor rowptr, Tensor col, Tensor length, Tensor sources) {
  check_csr(rowptr, col);
  check_floating("length", length);
  check_dim("length", length, 1);
  check_size("length", length, 0, col.size(0));
  check_contiguous("length", length);
  check_dim("sources", sources, 2);
  check_dtype("sources", sources, ScalarType::Long, "int64");
  check_contiguous("sources", sources);
  const int64_t rows = rowptr.size(0) - 1, graphs = sources.size(0), count = sources.size(1);
  LFM_CHECK(graphs >= 1 && rows % graphs == 0, "rowptr must hold ", graphs, " graphs of equal size, got ", rows,
            " nodes");
  const int64_t nodes = rows / graphs;
  LFM_CHECK(rows <= INT32_MAX, "rowptr must number at most 2^31 - 1 nodes, got ", rows);
  const int64_t* source = sources.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < graphs * count; ++s)
    LFM_CHECK(source[s] >= 0 && source[s] < nodes, "sources must lie in [0, ", nodes, "), got ", source[s]);
  Tensor out = torch::stable::new_empty(length, {graphs, nodes, count});
  dispatch_floating("length", length, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Paths<T> p{rowptr.const_data_ptr<int64_t>(), col.const_data_ptr<int32_t>(), length.const_data_ptr<T>(), nodes,
                     count};
    check_edges(p, rows);
    T* distances = out.mutable_data_ptr<T>();
    parallel_tasks(graphs * count,
                   [&](int64_t task) { dijkstra(p, task / count, source[task], task % count, distances); });
  });
  return out;
}

}  // namespace lfm
