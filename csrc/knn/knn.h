#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace lfm {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> knn_cpu(Tensor x, std::optional<Tensor> y, int64_t n_neighbors, std::string metric);

}  // namespace lfm
