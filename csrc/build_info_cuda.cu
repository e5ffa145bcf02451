// The origin of the CUDA library; lfm_torch/ops/_extension.py reads it for lfm_torch.build_info().
#include <cuda_runtime_api.h>

#include "build_info.h"
#include "lfm_torch_build.h"

// CUDART_VERSION is 1000 major + 10 minor.
LFM_EXPORT const char lfm_torch_build[] = "lfm_torch build: " LFM_BUILD "; cuda=" LFM_TEXT(CUDART_VERSION);
