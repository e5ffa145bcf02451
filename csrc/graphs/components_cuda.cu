// connected_components on the GPU: a forest that trees are hooked into, then the numbers of its roots.
// The labels of `connected_components_reference`: whatever the order of the hooks (integers, by compare and swap), the
// root of a component ends as its smallest node, and prefix sums number the roots in order. Nodes fit 32 bits.
#include <torch/csrc/stable/library.h>

#include "graphs/scan.cuh"
#include "graphs/threads.cuh"

namespace lfm {
namespace {

using namespace graphs;

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
  m.impl("connected_components", TORCH_BOX(&lfm::connected_components_cuda));
}
