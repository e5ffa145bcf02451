// The preparation of knn on the CPU as a whole (units.h, panels.h), and the constants E and E' of the bounds in
// points.h, with what rounding in the filter takes of them. (On the GPU: prepare.cuh.)
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "knn/knn.h"
#include "knn/panels.h"
#include "knn/points.h"
#include "knn/units.h"

namespace lfm::knn {

// N': the norm of the points in units of their largest feature over 127, on average.
inline double mean_look_norm(const Points& points) {
  double sum = 0;
  for (int64_t i = 0; i < points.count; ++i)
    sum += points.largest[i] > 0 ? 127 * std::sqrt(points.square[i]) / points.largest[i] : 127;
  return sum / static_cast<double>(points.count);
}

inline void scatter(Points& points) {
  const int64_t n = points.count, step = scattering_step(n);
  points.point.resize(n);
  for (int64_t position = 0, point = 0; position < n; ++position, point = (point + step) % n)
    points.point[position] = static_cast<int32_t>(point);
}

inline void set_size(Points& points, int64_t count, int64_t d) {
  const int64_t width = panel_width();
  points.count = count;
  points.panels = (count + width - 1) / width;
  points.pairs = (d + 1) / 2;
  scatter(points);
}

// Prepares a search of x in y, or in itself where y is null.
template <class T>
void prepare(const T* x, int64_t n, const T* y, int64_t m, int64_t d, Metric metric, bool first_look, Points& rows,
             Points& columns, Units& units) {
  units.centre.assign(d, 0.0);
  set_size(rows, n, d);
  find_scales(x, d, metric, rows);
  if (y) {
    set_size(columns, m, d);
    find_scales(y, d, metric, columns);
  }
  if (metric != Metric::inner_product) find_centre(y ? y : x, d, y ? columns : rows, units.centre);
  const Extent row_extent = measure_points(x, d, units.centre, rows);
  const Extent column_extent = y ? measure_points(y, d, units.centre, columns) : row_extent;
  set_units<T>(metric, d, row_extent, column_extent, units);
  if (!units.filterable) return;
  if (first_look) units.look_norm = mean_look_norm(y ? columns : rows);
  Residuals residuals = PanelFiller<T>(x, d, units, units.row, metric, rows).fill();
  if (y) residuals.include(PanelFiller<T>(y, d, units, units.column, metric, columns).fill());
  const double norm = units.integer_norm, bound = residuals.fine * (1 + 0x1p-20) + 0x1p-20;
  units.error = static_cast<int32_t>(std::ceil(bound * (2 * norm + bound) + 0x1p-18 * norm * norm)) + 1;
  // a point of few large features has less than N': the share of E' is for the rounding of its products
  const double look = units.look_norm, wide = residuals.look * (2 * look + residuals.look);
  units.look_error = static_cast<int32_t>(std::ceil(wide * (1 + 0x1p-16) + 0x1p-18 * look * look)) + 1;
}

}  // namespace lfm::knn
