// What symmetrize_edges and its gradient ask of the neighbour lists on the CPU (on the GPU: lists.cuh). Afterwards
// every index lies in [0, n), and the nodes of the whole batch fit 32 bits: kernels write by the indices unchecked.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "checks.h"
#include "parallel.h"

namespace lfm {

inline void check_lists(const Tensor& indices, const Tensor& weights) {
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
inline void check_indices_in_range(const Tensor& indices) {
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

}  // namespace lfm
