// The few results of a row of knn on the GPU, sorted by (value, index): a total order, which undoes the order in which
// candidates arrived. (On the CPU: ranked.h.)
#pragma once

#include "knn/problem.cuh"
#include "knn/select.cuh"

namespace lfm::knn {

// One result of a row, ordered by value, then by index.
template <class T>
struct Entry;

template <>
struct Entry<float> {
  Key bits;
  static __device__ Entry make(Key key, int64_t index) { return {key << 32 | static_cast<Key>(index)}; }
  static __device__ Entry last() { return {~Key{0}}; }
  __device__ int index() const { return static_cast<int>(bits & 0x7FFFFFFF); }
  __device__ Key key() const { return bits >> 32; }
  __device__ bool operator<(const Entry& other) const { return bits < other.bits; }
};

template <>
struct Entry<double> {
  Key bits;
  long long position;  // 64 bits: no padding
  static __device__ Entry make(Key key, int64_t index) { return {key, index}; }
  static __device__ Entry last() { return {~Key{0}, INT64_MAX}; }
  __device__ int index() const { return static_cast<int>(position); }
  __device__ Key key() const { return bits; }
  __device__ bool operator<(const Entry& other) const {
    return bits < other.bits || (bits == other.bits && position < other.position);
  }
};

// Bitonic sort by the block, in shared or global memory that has room for the next power of two.
template <class E>
__device__ void sort_entries(E* list, int size) {
  int padded = 1;
  while (padded < size) padded *= 2;
  for (int i = size + threadIdx.x; i < padded; i += kThreads) list[i] = E::last();
  __syncthreads();
  for (int run = 2; run <= padded; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int t = threadIdx.x; t < padded / 2; t += kThreads) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const E a = list[i], b = list[j];
        if ((b < a) == ((i & run) == 0)) {
          list[i] = b;
          list[j] = a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace lfm::knn
