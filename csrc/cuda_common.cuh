// What the CUDA kernels of all stages share: the device and stream of a call, scratch memory, and sizes of grids. A
// grid has at most 2^31 - 1 blocks, so that the index of a block fits an int; scratch memory comes from torch's
// allocator, aligned for every type. Sums have a fixed order, here and in the kernels: no atomics on floats.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"

namespace lfm {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// Makes the device of a tensor current while it lives, and finds the stream that torch queues work on there.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) : guard_(t.get_device_index()) {
    const int32_t device = t.get_device_index();
    // the guard set it in torch's CUDA runtime; this library is linked with a static one of its own
    STD_CUDA_CHECK(cudaSetDevice(device));
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Uninitialised scratch memory from torch's caching allocator: freed at the end of the call, reused in stream order.
template <class T>
class Buffer {
 public:
  Buffer(const Tensor& like, int64_t count)
      : tensor_(torch::stable::new_empty(like, {count * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte)),
        data_(reinterpret_cast<T*>(tensor_.mutable_data_ptr<uint8_t>())) {}
  T* get() const { return data_; }

 private:
  Tensor tensor_;
  T* data_;
};

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t power_of_two_at_least(int64_t a) {
  int64_t power = 1;
  while (power < a) power *= 2;
  return power;
}

// Every launch is one-dimensional: only x may exceed 65535 blocks.
inline unsigned grid_of(int64_t blocks) {
  LFM_CHECK(blocks >= 1 && blocks <= INT32_MAX, "a CUDA grid must have between 1 and 2^31 - 1 blocks, got ", blocks,
            ": split the batch");
  return static_cast<unsigned>(blocks);
}

inline void check_cuda(const char* name, const Tensor& t) {
  LFM_CHECK(t.is_cuda(), name, " must be on a CUDA device like the other tensors, got another kind of device");
}

inline void check_same_device(const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  LFM_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name, " must be on the device of ",
            like_name, ", cuda:", like.get_device_index(), ", got ", t.is_cuda() ? "cuda:" : "another kind of device ",
            t.get_device_index());
}

// Sum over aligned groups of kLanes lanes, the same bits in every lane of a group.
template <int kLanes, class T>
__device__ inline T lanes_sum(T value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

}  // namespace lfm
