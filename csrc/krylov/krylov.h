// Operators orthonormalize_block and batched_eigh (lfm_torch/ops/krylov.py), what a block Krylov solver does beside its
// products: the width of a block, and the CPU functions that ops.cpp registers. On a GPU their twins run.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "checks.h"

namespace lfm {

using torch::stable::Tensor;

// Columns of a block, and of the panels that hold a Krylov space.
inline constexpr int64_t kBlock = 16;

std::tuple<Tensor, Tensor> batched_eigh_cpu(Tensor matrices);
std::tuple<Tensor, Tensor, Tensor, Tensor> orthonormalize_block_cpu(Tensor panels, Tensor block, double scale);

}  // namespace lfm
