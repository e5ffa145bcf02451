// The directed neighbour lists of symmetrize_edges and its gradient on the GPU. Their indices are not read on the host:
// a kernel asks whether an edge is valid before it follows it. Nodes of the whole batch fit 32 bits, edges have 64.
#pragma once

#include "cuda_common.cuh"

namespace lfm::graphs {

// The directed lists: edge e goes from node e / k to node first + indices[e] of the same point set.
struct Edges {
  const int64_t* indices;
  int64_t n, k, count;  // count: edges of the whole batch
  __device__ int64_t from(int64_t e) const { return e / k; }
  __device__ int64_t first(int64_t node) const { return node / n * n; }
  __device__ bool valid(int64_t e) const { return indices[e] >= 0 && indices[e] < n; }
};

inline void check_lists(const Tensor& indices, const Tensor& weights) {
  check_cuda("weights", weights);
  check_dim("indices", indices, 3);
  check_dtype("indices", indices, ScalarType::Long, "int64");
  check_contiguous("indices", indices);
  check_same_device("indices", indices, "weights", weights);
  check_dim("weights", weights, 3);
  for (int64_t dim = 0; dim < 3; ++dim) check_size("weights", weights, dim, indices.size(dim));
  check_contiguous("weights", weights);
  check_floating("weights", weights);
  const int64_t rows = indices.size(0) * indices.size(1);
  LFM_CHECK(rows <= INT32_MAX, "indices must number at most 2^31 - 1 nodes over the batch, got ", rows);
}

}  // namespace lfm::graphs
