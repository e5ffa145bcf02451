#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace lfm {

using torch::stable::Tensor;

Tensor laplacian_product_cpu(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                             Tensor x, std::optional<Tensor> z, double a, double b, double c);
Tensor edge_products_cpu(Tensor rowptr, Tensor col, Tensor left, Tensor right, Tensor g, Tensor x);

}  // namespace lfm
