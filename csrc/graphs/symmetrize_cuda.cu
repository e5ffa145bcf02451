// symmetrize_edges on the GPU: every edge in both directions as a key, sorted into the order of a CSR; prefix sums over
// the first of equal keys give each entry its place. The host waits once, for the size of the result.
// Pattern and weights are those of `symmetrize_edges_reference`, bit for bit. Keys are below 2^62 and offsets have 64
// bits. The only atomic is a minimum of integers, over the edges whose index is out of range.
#include <torch/csrc/stable/library.h>

#include <cub/device/device_radix_sort.cuh>
#include <string>
#include <tuple>

#include "graphs/graphs.h"
#include "graphs/lists.cuh"
#include "graphs/scan.cuh"
#include "graphs/threads.cuh"

namespace lfm {
namespace {

using namespace graphs;

using Key = unsigned long long;

// Every edge in both directions, as the key row * n + column within the point set: in CSR order, and few bits to sort.
template <class T>
__global__ void __launch_bounds__(kThreads)
    key_kernel(Edges edges, const T* weights, Key* keys, T* values, Key* invalid) {
  const int64_t e = thread_index();
  if (e >= edges.count) return;
  const int64_t from = edges.from(e), first = edges.first(from);
  int64_t to = edges.indices[e];
  if (!edges.valid(e)) {
    atomicMin(invalid, static_cast<Key>(e));
    to = 0;
  }
  keys[e] = from * edges.n + to;
  keys[edges.count + e] = (first + to) * edges.n + from - first;
  values[e] = values[edges.count + e] = weights[e];
}

// An entry of the CSR begins at p: the first of one or two equal keys; under "mutual" only of two.
__device__ inline bool is_entry(const Key* keys, int64_t p, int64_t count, Mode mode) {
  const bool first = p == 0 || keys[p - 1] != keys[p];
  return first && (mode != Mode::mutual || (p + 1 < count && keys[p + 1] == keys[p]));
}

__global__ void __launch_bounds__(kThreads) entry_kernel(const Key* keys, int64_t count, Mode mode, int64_t* entries) {
  const int64_t p = thread_index();
  if (p <= count) entries[p] = p < count && is_entry(keys, p, count, mode);
}

// rowptr[row]: entries before the first key of the row.
__global__ void __launch_bounds__(kThreads)
    rowptr_kernel(const Key* keys, const int64_t* entries, int64_t count, int64_t n, int64_t rows, int64_t* rowptr) {
  const int64_t row = thread_index();
  if (row > rows) return;
  const Key wanted = static_cast<Key>(row) * n;
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  rowptr[row] = entries[low];
}

template <class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(const Key* keys, const T* values, const int64_t* entries,
                                                        int64_t count, int64_t n, Mode mode, int32_t* col, T* weight) {
  const int64_t p = thread_index();
  if (p >= count || !is_entry(keys, p, count, mode)) return;
  const int64_t row = keys[p] / n, at = entries[p];
  // an absent direction weighs 0; the three combinations do not depend on which direction is which
  const T one = values[p], other = p + 1 < count && keys[p + 1] == keys[p] ? values[p + 1] : T(0);
  col[at] = static_cast<int32_t>(row / n * n + static_cast<int64_t>(keys[p] % n));
  weight[at] = mode == Mode::mean     ? (one + other) / 2
               : mode == Mode::union_ ? (one < other ? other : one)
                                      : (other < one ? other : one);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> symmetrize(const Tensor& indices, const Tensor& weights, Mode mode,
                                              cudaStream_t stream) {
  const int64_t n = indices.size(1), k = indices.size(2), rows = indices.size(0) * n;
  const Edges edges{indices.const_data_ptr<int64_t>(), n, k, rows * k};
  const int64_t count = 2 * edges.count;
  Tensor rowptr = torch::stable::new_empty(indices, {rows + 1});
  if (count == 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(rowptr.mutable_data_ptr<int64_t>(), 0, (rows + 1) * sizeof(int64_t), stream));
    return {rowptr, torch::stable::new_empty(indices, {0}, ScalarType::Int), torch::stable::new_empty(weights, {0})};
  }
  // after the sort the spare keys make room for the positions of the entries, one more than there are keys
  const Buffer<Key> first_keys(indices, count + 1), second_keys(indices, count + 1);
  const Buffer<T> first_values(indices, count), second_values(indices, count);
  const Buffer<Key> invalid(indices, 1);  // the first edge whose index is out of range
  STD_CUDA_CHECK(cudaMemsetAsync(invalid.get(), 0xFF, sizeof(Key), stream));
  key_kernel<T><<<grid_for(edges.count), kThreads, 0, stream>>>(edges, weights.const_data_ptr<T>(), first_keys.get(),
                                                                first_values.get(), invalid.get());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  cub::DoubleBuffer<Key> keys(first_keys.get(), second_keys.get());
  cub::DoubleBuffer<T> values(first_values.get(), second_values.get());
  const Key largest = static_cast<Key>(rows) * n - 1;
  int bits = 1;
  while (largest >> bits != 0) ++bits;  // below 2^62: it ends
  {
    size_t bytes = 0;
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, values, count, 0, bits, stream));
    const Buffer<char> scratch(indices, static_cast<int64_t>(bytes));
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(scratch.get(), bytes, keys, values, count, 0, bits, stream));
  }
  int64_t* entries = reinterpret_cast<int64_t*>(keys.Alternate());
  entry_kernel<<<grid_for(count + 1), kThreads, 0, stream>>>(keys.Current(), count, mode, entries);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  exclusive_sum(indices, entries, count + 1, stream);
  rowptr_kernel<<<grid_for(rows + 1), kThreads, 0, stream>>>(keys.Current(), entries, count, n, rows,
                                                             rowptr.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  // the one wait for the GPU: the size of the result, and whether the indices were in range
  int64_t nnz = 0;
  Key bad = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&nnz, entries + count, sizeof(nnz), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaMemcpyAsync(&bad, invalid.get(), sizeof(bad), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  if (bad != ~Key{0}) {
    int64_t index = 0;
    STD_CUDA_CHECK(cudaMemcpy(&index, edges.indices + bad, sizeof(index), cudaMemcpyDeviceToHost));
    LFM_CHECK(false, "indices must lie in [0, ", n, "), got ", index);
  }
  Tensor col = torch::stable::new_empty(indices, {nnz}, ScalarType::Int);
  Tensor weight = torch::stable::new_empty(weights, {nnz});
  fill_kernel<T><<<grid_for(count), kThreads, 0, stream>>>(keys.Current(), values.Current(), entries, count, n, mode,
                                                           col.mutable_data_ptr<int32_t>(),
                                                           weight.mutable_data_ptr<T>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {rowptr, col, weight};
}

// Waits for the GPU once: the number of entries decides the size of the result. Not for CUDA graphs.
std::tuple<Tensor, Tensor, Tensor> symmetrize_edges_cuda(Tensor indices, Tensor weights, std::string mode) {
  check_lists(indices, weights);
  const Mode how = mode_of(mode);
  const DeviceScope scope(indices);
  return weights.scalar_type() == ScalarType::Float ? symmetrize<float>(indices, weights, how, scope.stream())
                                                    : symmetrize<double>(indices, weights, how, scope.stream());
}

}  // namespace
}  // namespace lfm

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) { m.impl("symmetrize_edges", TORCH_BOX(&lfm::symmetrize_edges_cuda)); }
