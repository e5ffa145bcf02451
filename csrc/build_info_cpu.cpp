// The origin of the CPU library, and the level of vector instructions that it takes on this machine;
// lfm_torch/ops/_extension.py reads both for lfm_torch.build_info().
#include "build_info.h"
#include "lfm_torch_build.h"
#include "simd.h"

#if defined(__clang__)
#define LFM_COMPILER "Clang " LFM_TEXT(__clang_major__) "." LFM_TEXT(__clang_minor__)
#else
#define LFM_COMPILER "GCC " LFM_TEXT(__GNUC__) "." LFM_TEXT(__GNUC_MINOR__)
#endif

LFM_EXPORT const char lfm_torch_build[] = "lfm_torch build: " LFM_BUILD "; compiler=" LFM_COMPILER;

// The level by the names of LFM_TORCH_SIMD.
LFM_EXPORT const char* lfm_torch_simd() {
  if (lfm::simd::has_vnni()) return "vnni";
  switch (lfm::simd::level()) {
    case lfm::simd::Level::avx512:
      return "avx512";
    case lfm::simd::Level::avx2:
      return "avx2";
    default:
      return "generic";
  }
}
