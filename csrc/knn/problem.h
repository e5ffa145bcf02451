// One search of knn on the CPU: its points, and where its results go. (On the GPU: problem.cuh.)
#pragma once

#include <cstdint>

#include "knn/knn.h"

namespace lfm::knn {

template <class T>
struct Problem {
  const T *x, *y;
  int64_t n, m, d, k;
  Metric metric;
  bool self;
  int64_t* indices;  // of row i at i * stride, counted from `first`
  T* distances;
  int64_t stride, first;
};

}  // namespace lfm::knn
