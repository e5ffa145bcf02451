// What laplacian_product and edge_products share on the GPU: loads of several columns, how they are chosen, and checks
// of a graph and its blocks. Loads of 16 bytes are taken only where every row of every block begins at a multiple.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cuda_common.cuh"

namespace lfm::laplacian {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// kVector columns at a time: one load of up to 16 bytes, which asks for aligned rows.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
  T v[kVector];
};

template <int kVector, class T>
__device__ inline Pack<T, kVector> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kVector>*>(from);
}

// Calls body with the compile-time number of lanes, the smallest power of two >= wanted.
template <class Body>
void with_lanes(int64_t wanted, const Body& body) {
  if (wanted <= 1) return body(std::integral_constant<int, 1>{});
  if (wanted <= 2) return body(std::integral_constant<int, 2>{});
  if (wanted <= 4) return body(std::integral_constant<int, 4>{});
  if (wanted <= 8) return body(std::integral_constant<int, 8>{});
  if (wanted <= 16) return body(std::integral_constant<int, 16>{});
  return body(std::integral_constant<int, 32>{});
}

// 16-byte loads where every row of every block starts at a multiple of 16 bytes.
template <class T>
bool vectorizable(int64_t columns, std::initializer_list<const T*> blocks) {
  bool aligned = columns % (16 / sizeof(T)) == 0;
  for (const T* block : blocks) aligned = aligned && reinterpret_cast<uintptr_t>(block) % 16 == 0;
  return aligned;
}

inline void check_scaling(const char* name, const Tensor& t, const char* like_name, const Tensor& like, int64_t rows) {
  check_same_device(name, t, like_name, like);
  check_like(name, t, like_name, like);
  check_dim(name, t, 1);
  check_size(name, t, 0, rows);
  check_contiguous(name, t);
}

inline void check_block(const char* name, const Tensor& t, const Tensor& x, int64_t rows) {
  check_same_device(name, t, "x", x);
  check_like(name, t, "x", x);
  check_dim(name, t, 2);
  check_size(name, t, 0, rows);
  check_size(name, t, 1, x.size(1));
  check_contiguous(name, t);
}

// Returns the number of rows.
inline int64_t check_graph(const Tensor& rowptr, const Tensor& col, const Tensor& x) {
  check_cuda("x", x);
  check_dim("x", x, 2);
  check_csr(rowptr, col);
  check_same_device("rowptr", rowptr, "x", x);
  check_same_device("col", col, "x", x);
  const int64_t rows = rowptr.size(0) - 1;
  LFM_CHECK(rows <= INT32_MAX, "rowptr must number at most 2^31 - 1 nodes, got ", rows);
  return rows;
}

}  // namespace lfm::laplacian
