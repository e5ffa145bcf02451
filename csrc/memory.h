// Large arrays that are written once: their first touch costs as much as the work on them, page by page. For the CPU
// kernels of knn, graphs, laplacian, krylov and maps; what is uninitialized here they fill before they read it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lfm {

// Asks for large pages where a whole one fits; a hint, with no other effect.
template <class T>
void prefer_large_pages(T* data, int64_t size) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(size) * sizeof(T);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline void prefer_large_pages(torch::stable::Tensor& fresh) {
  prefer_large_pages(static_cast<char*>(fresh.mutable_data_ptr()), fresh.numel() * fresh.element_size());
}

// An array left as it is, on large pages.
template <class T>
std::unique_ptr<T[]> uninitialized(int64_t size) {
  std::unique_ptr<T[]> data(new T[static_cast<size_t>(size)]);
  prefer_large_pages(data.get(), size);
  return data;
}

}  // namespace lfm
