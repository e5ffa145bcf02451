// Operators laplacian_product and edge_products (lfm_torch/ops/laplacian.py) and laplacian_recurrence (recurrence.py),
// which graphs/ and the eigensolvers work with: the checks of the recurrence, which both devices share, and the
// functions that ops.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"

namespace lfm {

// Returns the number of rows. coefficients [degree, 3] float64 in CPU memory; graphs: into how many parts of as many
// rows without an edge between them the graph falls.
inline int64_t check_recurrence(const Tensor& rowptr, const Tensor& col, const Tensor& weight, const Tensor& diagonal,
                                const Tensor& left, const Tensor& right, const Tensor& x, const Tensor& coefficients,
                                int64_t graphs) {
  check_csr(rowptr, col);
  const int64_t rows = rowptr.size(0) - 1;
  check_dim("x", x, 2);
  check_contiguous("x", x);
  check_size("x", x, 0, rows);
  check_floating("x", x);
  const auto check_values = [&](const char* name, const Tensor& t, int64_t size) {
    check_like(name, t, "x", x);
    check_dim(name, t, 1);
    check_size(name, t, 0, size);
    check_contiguous(name, t);
  };
  check_values("weight", weight, col.size(0));
  check_values("diagonal", diagonal, rows);
  check_values("left", left, rows);
  check_values("right", right, rows);
  check_dim("coefficients", coefficients, 2);
  check_size("coefficients", coefficients, 1, 3);
  check_dtype("coefficients", coefficients, ScalarType::Double, "float64");
  check_contiguous("coefficients", coefficients);
  LFM_CHECK(coefficients.is_cpu(), "coefficients must be on the CPU, got another device");
  LFM_CHECK(graphs >= 1 && rows % graphs == 0, "graphs must divide the number of rows, ", rows, ", got ", graphs);
  return rows;
}

Tensor laplacian_product_cpu(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                             Tensor x, std::optional<Tensor> z, double a, double b, double c);
// The CUDA recurrence is made of it.
Tensor laplacian_product_cuda(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                              Tensor x, std::optional<Tensor> z, double a, double b, double c);
Tensor laplacian_recurrence_cpu(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                                Tensor x, Tensor coefficients, int64_t graphs);
Tensor edge_products_cpu(Tensor rowptr, Tensor col, Tensor left, Tensor right, Tensor g, Tensor x);

}  // namespace lfm
