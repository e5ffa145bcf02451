// geodesics on the GPU: Bellman-Ford, all sources of a node side by side, so that an edge's distances are read in one
// line. A step pulls over all edges; a few hops reach everything in a neighbour graph.
// The same bits as `geodesics_reference`. Nodes are updated in place: only the warp that owns an entry writes it,
// entries only ever fall, and a step in which nothing was written has read a fixed point: rounded addition is monotone,
// so there is one, whatever the order.
// Sources are checked on the device; the columns of a valid CSR stay within their graph. Nodes fit 32 bits.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <type_traits>

#include "cuda_common.cuh"

namespace lfm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// steps between two looks at whether anything changed: each look waits for the GPU
constexpr int kStepsPerLook = 4;

// What the host reads back.
struct Status {
  unsigned long long changed, invalid;  // invalid: the first source that is no node, all bits set if there is none
};

template <class T>
struct Paths {
  const int64_t* rowptr;
  const int32_t* col;
  const T* length;
  const int64_t* sources;
  T* distance;  // [rows, columns]
  Status* status;
  int64_t rows, nodes, columns, blocks;  // nodes: of one graph; blocks: of kLanes columns
};

template <class T>
__global__ void __launch_bounds__(kThreads) start_kernel(Paths<T> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * p.columns) return;
  const int64_t row = i / p.columns, graph = row / p.nodes;
  const int64_t at = graph * p.columns + i % p.columns, source = p.sources[at];
  p.distance[i] = source == row - graph * p.nodes ? T(0) : std::numeric_limits<T>::infinity();
  if (row == graph * p.nodes && (source < 0 || source >= p.nodes))
    atomicMin(&p.status->invalid, static_cast<unsigned long long>(at));
}

// A warp takes one node and kLanes sources; its other lanes take other edges.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) relax_kernel(Paths<T> p) {
  constexpr int kEdges = kWarp / kLanes;
  const int lane = threadIdx.x % kWarp, across = lane % kLanes, edge = lane / kLanes;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (task >= p.rows * p.blocks) return;
  const int64_t row = task / p.blocks, column = task % p.blocks * kLanes + across;
  const bool active = column < p.columns;
  volatile T* distance = p.distance + (active ? column : 0);
  const T before = distance[row * p.columns];
  T best = before;
  for (int64_t e = p.rowptr[row] + edge; e < p.rowptr[row + 1]; e += kEdges) {
    const T way = distance[p.col[e] * p.columns] + p.length[e];
    if (way < best) best = way;
  }
#pragma unroll
  for (int offset = kLanes; offset < kWarp; offset *= 2) {
    const T other = __shfl_xor_sync(kFullWarp, best, offset);
    if (other < best) best = other;
  }
  if (!active || edge != 0 || !(best < before)) return;
  distance[row * p.columns] = best;
  p.status->changed = 1;
}

template <class T>
void relax(Paths<T> p, cudaStream_t stream) {
  const auto launch = [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    p.blocks = ceil_div(p.columns, kLanes);
    relax_kernel<T, kLanes><<<grid_of(ceil_div(p.rows * p.blocks, kWarps)), kThreads, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (p.columns <= 1) return launch(std::integral_constant<int, 1>{});
  if (p.columns <= 4) return launch(std::integral_constant<int, 4>{});
  if (p.columns <= 16) return launch(std::integral_constant<int, 16>{});
  launch(std::integral_constant<int, 32>{});
}

template <class T>
void solve(const Paths<T>& p, cudaStream_t stream) {
  STD_CUDA_CHECK(cudaMemsetAsync(&p.status->invalid, 0xFF, sizeof(p.status->invalid), stream));
  start_kernel<T><<<grid_of(ceil_div(p.rows * p.columns, kThreads)), kThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  // a path has at most nodes - 1 edges: the bound holds off lengths that are negative or NaN
  for (int64_t step = 0; step < p.nodes; step += kStepsPerLook) {
    Status status{};
    STD_CUDA_CHECK(cudaMemsetAsync(&p.status->changed, 0, sizeof(status.changed), stream));
    for (int i = 0; i < kStepsPerLook; ++i) relax(p, stream);
    STD_CUDA_CHECK(cudaMemcpyAsync(&status, p.status, sizeof(status), cudaMemcpyDeviceToHost, stream));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream));
    if (status.invalid != ~0ull) {
      int64_t source = 0;
      STD_CUDA_CHECK(cudaMemcpy(&source, p.sources + status.invalid, sizeof(source), cudaMemcpyDeviceToHost));
      LFM_CHECK(false, "sources must lie in [0, ", p.nodes, "), got ", source);
    }
    if (!status.changed) return;
  }
}

// Waits for the GPU every few steps. Not for CUDA graphs.
Tensor geodesics_cuda(Tensor rowptr, Tensor col, Tensor length, Tensor sources) {
  check_cuda("length", length);
  check_floating("length", length);
  check_csr(rowptr, col);
  check_same_device("rowptr", rowptr, "length", length);
  check_same_device("col", col, "length", length);
  check_dim("length", length, 1);
  check_size("length", length, 0, col.size(0));
  check_contiguous("length", length);
  check_same_device("sources", sources, "length", length);
  check_dim("sources", sources, 2);
  check_dtype("sources", sources, ScalarType::Long, "int64");
  check_contiguous("sources", sources);
  const int64_t rows = rowptr.size(0) - 1, graphs = sources.size(0), count = sources.size(1);
  LFM_CHECK(graphs >= 1 && rows % graphs == 0, "rowptr must hold ", graphs, " graphs of equal size, got ", rows,
            " nodes");
  LFM_CHECK(rows <= INT32_MAX, "rowptr must number at most 2^31 - 1 nodes, got ", rows);
  const DeviceScope scope(length);
  Tensor out = torch::stable::new_empty(length, {graphs, rows / graphs, count});
  if (rows == 0 || count == 0) return out;
  const Buffer<Status> status(length, 1);
  dispatch_floating("length", length, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    solve(Paths<T>{rowptr.const_data_ptr<int64_t>(), col.const_data_ptr<int32_t>(), length.const_data_ptr<T>(),
                   sources.const_data_ptr<int64_t>(), out.mutable_data_ptr<T>(), status.get(), rows, rows / graphs,
                   count, 1},
          scope.stream());
  });
  return out;
}

}  // namespace
}  // namespace lfm

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) { m.impl("geodesics", TORCH_BOX(&lfm::geodesics_cuda)); }
