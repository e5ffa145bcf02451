#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace lfm {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> knn_cpu(Tensor x, std::optional<Tensor> y, int64_t n_neighbors, std::string metric,
                                   int64_t memory_budget);
std::tuple<Tensor, Tensor> knn_ragged_cpu(Tensor x, std::optional<Tensor> y, Tensor offsets,
                                          std::optional<Tensor> y_offsets, int64_t n_neighbors, std::string metric,
                                          int64_t memory_budget);

}  // namespace lfm
