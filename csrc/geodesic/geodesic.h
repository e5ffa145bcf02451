#pragma once

#include <torch/csrc/stable/tensor.h>

namespace lfm {

using torch::stable::Tensor;

Tensor geodesics_cpu(Tensor rowptr, Tensor col, Tensor length, Tensor sources);

}  // namespace lfm
