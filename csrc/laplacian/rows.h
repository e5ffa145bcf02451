// The CSR of a graph, and its rows shared out over threads in pieces of about equal numbers of edges, for the CPU
// kernels of laplacian/. A row is in one piece, whole: sums over its edges do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace lfm {

template <class T>
struct Csr {
  const int64_t* rowptr;
  const int32_t* col;
  const T* weight;
  int64_t rows;
};

// multiply-adds below which threads cost more than they save
inline constexpr int64_t kSerialWork = 1 << 15;

// Runs body(begin, end) over all rows, in pieces of about equal numbers of edges.
template <class T, class Body>
void over_rows(const Csr<T>& graph, int64_t columns, const Body& body) {
  const int64_t nnz = graph.rowptr[graph.rows];
  const int64_t work = (nnz + graph.rows) * columns;
  if (work < kSerialWork) {
    body(int64_t{0}, graph.rows);
    return;
  }
  const int64_t pieces = std::min<int64_t>(graph.rows, torch::stable::get_num_threads() * 8);
  const auto boundary = [&](int64_t piece) {
    if (piece == pieces) return graph.rows;
    const int64_t edges = (nnz + graph.rows) * piece / pieces;
    // rows before which about `edges` edges (and rows, so that empty rows count) lie
    int64_t low = 0, high = graph.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (graph.rowptr[middle] + middle < edges) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  parallel_tasks(pieces, [&](int64_t piece) { body(boundary(piece), boundary(piece + 1)); });
}

}  // namespace lfm
