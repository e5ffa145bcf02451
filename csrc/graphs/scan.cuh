// Prefix sums of the counts of symmetrize_edges and connected_components on the GPU: integers in 64 bits.
#pragma once

#include <cub/device/device_scan.cuh>

#include "cuda_common.cuh"

namespace lfm::graphs {

// Exclusive prefix sums in place.
inline void exclusive_sum(const Tensor& like, int64_t* values, int64_t count, cudaStream_t stream) {
  size_t bytes = 0;
  STD_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(nullptr, bytes, values, values, count, stream));
  const Buffer<char> scratch(like, static_cast<int64_t>(bytes));
  STD_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(scratch.get(), bytes, values, values, count, stream));
}

}  // namespace lfm::graphs
