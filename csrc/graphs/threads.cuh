// What the CUDA kernels of this folder share: one thread an item, its index in 64 bits.
#pragma once

#include "cuda_common.cuh"

namespace lfm::graphs {

constexpr int kThreads = 256;

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

inline unsigned grid_for(int64_t threads) { return grid_of(std::max<int64_t>(1, ceil_div(threads, kThreads))); }

}  // namespace lfm::graphs
