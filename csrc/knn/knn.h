// Operators knn and knn_ragged (lfm_torch/ops/knn.py), the neighbours that graphs are made of: the metrics and the
// order in which points are visited, which both devices share, and the CPU functions that ops.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

namespace lfm {

namespace knn {

enum class Metric { euclidean, cosine, angular, inner_product };

inline Metric metric_of(const std::string& metric) {
  if (metric == "euclidean") return Metric::euclidean;
  if (metric == "cosine") return Metric::cosine;
  if (metric == "angular") return Metric::angular;
  LFM_CHECK(metric == "inner_product", "metric must be one of 'euclidean', 'cosine', 'angular', 'inner_product', got '",
            metric, "'");
  return Metric::inner_product;
}

// A step near the golden ratio of the points, prime to them: any run of positions is spread evenly over the points.
inline int64_t scattering_step(int64_t points) {
  int64_t step = std::max<int64_t>(1, static_cast<int64_t>(0.6180339887498949 * static_cast<double>(points)));
  while (std::gcd(step, points) != 1) ++step;
  return step;
}

}  // namespace knn

std::tuple<Tensor, Tensor> knn_cpu(Tensor x, std::optional<Tensor> y, int64_t n_neighbors, std::string metric,
                                   int64_t memory_budget);
std::tuple<Tensor, Tensor> knn_ragged_cpu(Tensor x, std::optional<Tensor> y, Tensor offsets,
                                          std::optional<Tensor> y_offsets, int64_t n_neighbors, std::string metric,
                                          int64_t memory_budget);

}  // namespace lfm
