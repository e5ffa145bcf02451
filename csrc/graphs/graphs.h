// Operators symmetrize_edges, symmetrize_edges_backward and connected_components (lfm_torch/ops/graphs.py), from
// neighbour lists to a graph: the modes, which both devices share, and the CPU functions that ops.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "checks.h"

namespace lfm {

// How the two directions of an edge are joined: SYMMETRIZATIONS of lfm_torch/ops/graphs.py.
enum class Mode { mean, union_, mutual };

inline Mode mode_of(const std::string& mode) {
  if (mode == "mean") return Mode::mean;
  if (mode == "union") return Mode::union_;
  LFM_CHECK(mode == "mutual", "mode must be one of 'mean', 'union', 'mutual', got '", mode, "'");
  return Mode::mutual;
}

std::tuple<Tensor, Tensor, Tensor> symmetrize_edges_cpu(Tensor indices, Tensor weights, std::string mode);
Tensor symmetrize_edges_backward_cpu(Tensor indices, Tensor weights, Tensor rowptr, Tensor col, Tensor grad,
                                     std::string mode);
Tensor connected_components_cpu(Tensor rowptr, Tensor col);

}  // namespace lfm
