#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

namespace lfm {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> symmetrize_edges_cpu(Tensor indices, Tensor weights, std::string mode);
Tensor symmetrize_edges_backward_cpu(Tensor indices, Tensor weights, Tensor rowptr, Tensor col, Tensor grad,
                                     std::string mode);
Tensor connected_components_cpu(Tensor rowptr, Tensor col);

}  // namespace lfm
