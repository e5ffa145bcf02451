// What the kernels of one knn call share on the GPU. A query is a "row", a point of the database a "column", of one
// point set. (On the CPU: problem.h.)
#pragma once

#include "cuda_common.cuh"
#include "knn/knn.h"

namespace lfm::knn {

constexpr int kThreads = 256;
constexpr int kTile = 128;  // rows and columns of a filter tile; a panel holds the features of this many points

// What products are made with; bounds and limits exist for each.
enum Precision : int { kFloat, kTensor, kPrecisions };

struct Problem {
  int64_t rows, columns, features;  // n, m, d of each point set of the batch
  int row_panels, column_panels;    // rows and columns in panels, rounded up
  int64_t depth;                    // features in the panels, padded with zeros
  int64_t column_step;              // position c of the column panels holds point c * column_step % columns
  int k;
  bool self;  // rows are the columns, in the order of the panels, and none is its own neighbour
  Metric metric;
  double epsilon[kPrecisions], slack;  // of the bounds, see filter.cuh
};

// The database is visited in a scattered order, so that the first columns of a sorted or clustered set are a fair
// sample of all of it and give a useful threshold.
__device__ inline int64_t point_of_column(const Problem& p, int64_t position) {
  return position * p.column_step % p.columns;
}
__device__ inline int64_t point_of_row(const Problem& p, int64_t position) {
  return p.self ? point_of_column(p, position) : position;
}

// Largest magnitudes of the shifted points of each point set, as the bits of a double: [batch][rows, columns].
using Extent = unsigned long long;

struct Units {
  double row, column;  // powers of two that bring the largest magnitude to [1, 2)
  bool filterable;  // false: nearly denormal, overflowing or all-zero data, where the bounds of the filter do not hold
};

// T is the dtype of the result. Its rounding is relative only away from its underflow: a denormal errs by 2^-150
// (2^-1075), and that, times the factor by which distances are scaled here (the square of it for "cosine", both factors
// for products), has to stay below the slack of the bounds, d 2^-56. Neither may it overflow.
template <class T>
__device__ inline Units units_of(const Problem& p, const Extent* extent, int64_t batch) {
  constexpr bool kSingle = sizeof(T) == 4;
  double row = __longlong_as_double(static_cast<long long>(extent[2 * batch]));
  double column = p.self ? row : __longlong_as_double(static_cast<long long>(extent[2 * batch + 1]));
  bool filterable;
  if (p.metric == Metric::inner_product) {
    const double product = row * column;
    filterable = row >= 0x1p-1000 && column >= 0x1p-1000 && product >= (kSingle ? 0x1p-90 : 0x1p-900) &&
                 product <= (kSingle ? 0x1p100 : 0x1p900);
  } else {
    row = column = fmax(row, column);
    const double low = !kSingle ? 0x1p-400 : p.metric == Metric::cosine ? 0x1p-45 : 0x1p-80;
    filterable = row >= low && row <= (kSingle ? 0x1p100 : 0x1p400);
  }
  if (!filterable) return {1.0, 1.0, false};
  return {scalbn(1.0, -ilogb(row)), scalbn(1.0, -ilogb(column)), true};
}

}  // namespace lfm::knn
