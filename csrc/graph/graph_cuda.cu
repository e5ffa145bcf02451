// Directed neighbour lists to a symmetric CSR graph on the GPU, its gradient, and connected components. Integer atomics
// only, and in places where their order cannot be seen in the result.
#include <torch/csrc/stable/library.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda_common.cuh"

namespace lfm {
namespace {

constexpr int kThreads = 256;

enum class Mode { mean, union_, mutual };

Mode mode_of(const std::string& mode) {
  if (mode == "mean") return Mode::mean;
  if (mode == "union") return Mode::union_;
  LFM_CHECK(mode == "mutual", "mode must be one of 'mean', 'union', 'mutual', got '", mode, "'");
  return Mode::mutual;
}

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

unsigned grid_for(int64_t threads) { return grid_of(std::max<int64_t>(1, ceil_div(threads, kThreads))); }

// Exclusive prefix sums in place.
void exclusive_sum(const Tensor& like, int64_t* values, int64_t count, cudaStream_t stream) {
  size_t bytes = 0;
  STD_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(nullptr, bytes, values, values, count, stream));
  const Buffer<char> scratch(like, static_cast<int64_t>(bytes));
  STD_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(scratch.get(), bytes, values, values, count, stream));
}

// The directed lists: edge e goes from node e / k to node first + indices[e] of the same point set.
struct Edges {
  const int64_t* indices;
  int64_t n, k, count;  // count: edges of the whole batch
  __device__ int64_t from(int64_t e) const { return e / k; }
  __device__ int64_t first(int64_t node) const { return node / n * n; }
  __device__ bool valid(int64_t e) const { return indices[e] >= 0 && indices[e] < n; }
};

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

struct Csr {
  const int64_t* rowptr;
  const int32_t* col;
  // Position of (row, column), or -1.
  __device__ int64_t find(int64_t row, int64_t column) const {
    int64_t low = rowptr[row], high = rowptr[row + 1];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (col[middle] < column) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < rowptr[row + 1] && col[low] == column ? low : -1;
  }
};

// directed[position of (i, j)] = weight of the edge i -> j; the others keep NaN: no such edge.
template <class T>
__global__ void __launch_bounds__(kThreads) direct_kernel(Edges edges, const T* weights, Csr csr, T* directed) {
  const int64_t e = thread_index();
  if (e >= edges.count || !edges.valid(e)) return;
  const int64_t from = edges.from(e), at = csr.find(from, edges.first(from) + edges.indices[e]);
  if (at >= 0) directed[at] = weights[e];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Edges edges, const T* weights, Csr csr, const T* directed, const T* grad, Mode mode, T* out) {
  const int64_t e = thread_index();
  if (e >= edges.count) return;
  T both = 0, share = T(0.5);
  if (edges.valid(e)) {
    const int64_t from = edges.from(e), to = edges.first(from) + edges.indices[e];
    const int64_t there = csr.find(from, to), back = csr.find(to, from);
    both = (there >= 0 ? grad[there] : T(0)) + (back >= 0 ? grad[back] : T(0));
    if (mode != Mode::mean) {
      const T own = weights[e], other = back >= 0 ? directed[back] : static_cast<T>(NAN);
      if (isnan(other)) {
        share = mode == Mode::union_ ? T(1) : T(0);
      } else if (own != other) {
        share = (mode == Mode::union_ ? own > other : own < other) ? T(1) : T(0);
      }
    }
  }
  out[e] = share * both;
}

template <class T>
void symmetrize_backward(const Edges& edges, const Tensor& weights, const Csr& csr, const Tensor& grad, Mode mode,
                         T* out, cudaStream_t stream) {
  const int64_t nnz = grad.size(0);
  const Buffer<T> directed(grad, mode == Mode::mean ? 0 : nnz);
  if (mode != Mode::mean && nnz > 0) {
    // all bits set is a NaN
    STD_CUDA_CHECK(cudaMemsetAsync(directed.get(), 0xFF, nnz * sizeof(T), stream));
    direct_kernel<T>
        <<<grid_for(edges.count), kThreads, 0, stream>>>(edges, weights.const_data_ptr<T>(), csr, directed.get());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  backward_kernel<T><<<grid_for(edges.count), kThreads, 0, stream>>>(
      edges, weights.const_data_ptr<T>(), csr, directed.get(), grad.const_data_ptr<T>(), mode, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Forest of the nodes: parent[i] <= i, so that the root of a tree is its smallest node. Trees are joined by hooking the
// larger root under the smaller one (Jaiganesh & Burtscher 2018, ECL-CC); other threads may shorten paths meanwhile,
// but what they write is an ancestor too.
__device__ inline int32_t find_root(volatile int32_t* parent, int32_t node) {
  int32_t up = parent[node];
  while (up != node) {
    const int32_t next = parent[up];
    if (next == up) return up;
    parent[node] = next;
    node = up;
    up = next;
  }
  return node;
}

// A first guess that joins most nodes: the smallest neighbour, if it is smaller than the node.
__global__ void __launch_bounds__(kThreads)
    plant_kernel(const int64_t* rowptr, const int32_t* col, int64_t rows, int32_t* parent) {
  const int64_t i = thread_index();
  if (i >= rows) return;
  const int32_t node = static_cast<int32_t>(i);
  parent[i] = rowptr[i] < rowptr[i + 1] ? min(node, col[rowptr[i]]) : node;
}

__global__ void __launch_bounds__(kThreads)
    hook_kernel(const int64_t* rowptr, const int32_t* col, int64_t rows, int32_t* parent) {
  const int64_t row = thread_index() / kWarp;
  if (row >= rows) return;
  for (int64_t e = rowptr[row] + threadIdx.x % kWarp; e < rowptr[row + 1]; e += kWarp) {
    int32_t one = find_root(parent, static_cast<int32_t>(row)), other = find_root(parent, col[e]);
    while (one != other) {
      const int32_t larger = max(one, other), smaller = min(one, other);
      const int32_t seen = atomicCAS(parent + larger, larger, smaller);
      if (seen == larger) break;
      one = find_root(parent, seen);  // another thread has hooked it: go on from there
      other = smaller;
    }
  }
}

// label[i] = root of i; is_root marks the roots, and the sums over the marks before a root are the number of its
// component.
__global__ void __launch_bounds__(kThreads)
    root_kernel(const int32_t* parent, int64_t rows, int64_t* label, int64_t* is_root) {
  const int64_t i = thread_index();
  if (i >= rows) return;
  int32_t root = static_cast<int32_t>(i);
  while (parent[root] != root) root = parent[root];
  label[i] = root;
  is_root[i] = root == i;
}

__global__ void __launch_bounds__(kThreads) number_kernel(const int64_t* number, int64_t rows, int64_t* label) {
  const int64_t i = thread_index();
  if (i < rows) label[i] = number[label[i]];
}

void check_lists(const Tensor& indices, const Tensor& weights) {
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

// Waits for the GPU once: the number of entries decides the size of the result. Not for CUDA graphs.
std::tuple<Tensor, Tensor, Tensor> symmetrize_edges_cuda(Tensor indices, Tensor weights, std::string mode) {
  check_lists(indices, weights);
  const Mode how = mode_of(mode);
  const DeviceScope scope(indices);
  return weights.scalar_type() == ScalarType::Float ? symmetrize<float>(indices, weights, how, scope.stream())
                                                    : symmetrize<double>(indices, weights, how, scope.stream());
}

Tensor symmetrize_edges_backward_cuda(Tensor indices, Tensor weights, Tensor rowptr, Tensor col, Tensor grad,
                                      std::string mode) {
  check_lists(indices, weights);
  check_csr(rowptr, col);
  check_same_device("rowptr", rowptr, "indices", indices);
  check_same_device("col", col, "indices", indices);
  check_size("rowptr", rowptr, 0, indices.size(0) * indices.size(1) + 1);
  check_same_device("grad", grad, "indices", indices);
  check_like("grad", grad, "weights", weights);
  check_dim("grad", grad, 1);
  check_size("grad", grad, 0, col.size(0));
  check_contiguous("grad", grad);
  const Mode how = mode_of(mode);
  const DeviceScope scope(indices);
  Tensor out = torch::stable::new_empty(weights, weights.sizes());
  const Edges edges{indices.const_data_ptr<int64_t>(), indices.size(1), indices.size(2), indices.numel()};
  if (edges.count == 0) return out;
  const Csr csr{rowptr.const_data_ptr<int64_t>(), col.const_data_ptr<int32_t>()};
  dispatch_floating("weights", weights, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    symmetrize_backward<T>(edges, weights, csr, grad, how, out.mutable_data_ptr<T>(), scope.stream());
  });
  return out;
}

Tensor connected_components_cuda(Tensor rowptr, Tensor col) {
  check_cuda("rowptr", rowptr);
  check_csr(rowptr, col);
  check_same_device("col", col, "rowptr", rowptr);
  const int64_t rows = rowptr.size(0) - 1;
  LFM_CHECK(rows <= INT32_MAX, "rowptr must number at most 2^31 - 1 nodes, got ", rows);
  const DeviceScope scope(rowptr);
  const cudaStream_t stream = scope.stream();
  Tensor labels = torch::stable::new_empty(rowptr, {rows});
  if (rows == 0) return labels;
  const Buffer<int32_t> parent(rowptr, rows);
  const Buffer<int64_t> number(rowptr, rows);
  const int64_t* start = rowptr.const_data_ptr<int64_t>();
  const int32_t* column = col.const_data_ptr<int32_t>();
  int64_t* label = labels.mutable_data_ptr<int64_t>();
  plant_kernel<<<grid_for(rows), kThreads, 0, stream>>>(start, column, rows, parent.get());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  hook_kernel<<<grid_for(rows * kWarp), kThreads, 0, stream>>>(start, column, rows, parent.get());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  root_kernel<<<grid_for(rows), kThreads, 0, stream>>>(parent.get(), rows, label, number.get());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  exclusive_sum(rowptr, number.get(), rows, stream);
  number_kernel<<<grid_for(rows), kThreads, 0, stream>>>(number.get(), rows, label);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return labels;
}

}  // namespace
}  // namespace lfm

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) {
  m.impl("symmetrize_edges", TORCH_BOX(&lfm::symmetrize_edges_cuda));
  m.impl("symmetrize_edges_backward", TORCH_BOX(&lfm::symmetrize_edges_backward_cuda));
  m.impl("connected_components", TORCH_BOX(&lfm::connected_components_cuda));
}
