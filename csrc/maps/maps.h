// Operators inner_products and map_energies (lfm_torch/ops/maps.py), all functional maps of two stacks of bases and
// their readings: the layout of the result and the checks of map_energies, which both devices share, and the CPU
// functions that ops.cpp registers. On a GPU the twin of inner_products runs: one matrix product.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "checks.h"

namespace lfm {

// Sums over the entries of a functional map that all readings are made of, in the order of the operator's result.
enum Energy : int { kCarried, kWeighted, kCommutator, kOnX, kOffX, kOnY, kOffY, kEnergies };

struct MapSizes {
  int64_t ys, m_y, xs, m_x;
};

// C [A, m_y, B, m_x] and its factors: values of x [A or 1, B, m_x], of y [A, B or 1, m_y].
inline MapSizes check_maps(const Tensor& C, const Tensor& evals_x, const Tensor& evals_y, const Tensor& weight_x,
                           const Tensor& weight_y, int64_t skip) {
  check_dim("C", C, 4);
  check_contiguous("C", C);
  check_floating("C", C);
  const MapSizes s{C.size(0), C.size(1), C.size(2), C.size(3)};
  const auto check_factor = [&](const char* name, const Tensor& t, int64_t own, int64_t own_size, int64_t m) {
    check_like(name, t, "C", C);
    check_dim(name, t, 3);
    check_contiguous(name, t);
    check_size(name, t, own, own_size);
    check_size(name, t, 2, m);
    const int64_t other = own == 0 ? s.xs : s.ys;
    LFM_CHECK(t.size(1 - own) == 1 || t.size(1 - own) == other, name, " must have 1 or ", other,
              " entries in dimension ", 1 - own, ", got shape ", shape_of(t));
  };
  check_factor("evals_x", evals_x, 1, s.xs, s.m_x);
  check_factor("weight_x", weight_x, 1, s.xs, s.m_x);
  check_factor("evals_y", evals_y, 0, s.ys, s.m_y);
  check_factor("weight_y", weight_y, 0, s.ys, s.m_y);
  LFM_CHECK(skip >= 0, "skip must not be negative, got ", skip);
  return s;
}

Tensor inner_products_cpu(Tensor x, Tensor y);
Tensor map_energies_cpu(Tensor C, Tensor evals_x, Tensor evals_y, Tensor weight_x, Tensor weight_y, int64_t skip);

}  // namespace lfm
