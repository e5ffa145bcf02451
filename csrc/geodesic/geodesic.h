// Operator geodesics (lfm_torch/ops/geodesic.py), the distances of the descriptors: the CPU function that ops.cpp
// registers. The CUDA one registers itself.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace lfm {

using torch::stable::Tensor;

Tensor geodesics_cpu(Tensor rowptr, Tensor col, Tensor length, Tensor sources);

}  // namespace lfm
