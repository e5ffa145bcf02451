// Preparation of knn on the GPU, linear in the input: unit rows for the angular metrics, a centre, a power-of-two
// scale, and the points in float32 panels with the half squared norms that the bounds of filter.cuh are made of,
// rounded outwards. The one atomic is a maximum of integers.
#pragma once

#include "knn/problem.cuh"

namespace lfm::knn {

constexpr int kCentreSamples = 1024;
constexpr int kStripRows = 32;  // rows of a panel that one block writes

// unit[r] = x[r] / |x[r]| in float64; a zero row (refused by Python) stays zero.
template <class T>
__global__ void __launch_bounds__(kThreads) unit_kernel(const T* x, double* unit, int64_t rows, int64_t d) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  double factor = 1.0;
  if (sizeof(T) == 8) {  // squares of float64 may overflow or vanish; those of float32 cannot
    double largest = 0.0;
    for (int64_t c = lane; c < d; c += kWarp) largest = fmax(largest, fabs(static_cast<double>(x[row * d + c])));
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    if (largest > 0.0 && largest <= 1.7976931348623157e308) factor = scalbn(1.0, min(1000, -ilogb(largest)));
  }
  double sum = 0.0;
  for (int64_t c = lane; c < d; c += kWarp) {
    const double value = x[row * d + c] * factor;
    sum = fma(value, value, sum);
  }
  const double norm = sqrt(lanes_sum<kWarp>(sum));
  for (int64_t c = lane; c < d; c += kWarp) unit[row * d + c] = norm == 0.0 ? 0.0 : x[row * d + c] * factor / norm;
}

// Mean of a sample of the rows. Any centre is right; one in the middle of the points makes the bounds tight.
template <class S>
__global__ void __launch_bounds__(kThreads) centre_kernel(const S* x, int64_t rows, int64_t d, double* centre) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double sums[kWarps][kWarp];
  const int64_t strips = ceil_div(d, kWarp), batch = blockIdx.x / strips;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = blockIdx.x % strips * kWarp + lane;
  const int64_t samples = rows < kCentreSamples ? rows : kCentreSamples;
  double sum = 0.0;
  if (column < d) {
#pragma unroll 8
    for (int64_t s = warp; s < samples; s += kWarps) sum += x[(batch * rows + s * rows / samples) * d + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < d) {
    for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
    centre[batch * d + column] = sum / static_cast<double>(samples);
  }
}

// extent[2 batch] = max |x - centre|; the largest of non-negative doubles is the largest of their bits.
template <class S>
__global__ void __launch_bounds__(kThreads)
    extent_kernel(const S* x, const double* centre, int64_t rows, int64_t d, int64_t blocks, Extent* extent) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double largest_of[kWarps];
  const int64_t batch = blockIdx.x / blocks;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double largest = 0.0;
  for (int64_t row = blockIdx.x % blocks * kWarps + warp; row < rows; row += blocks * kWarps) {
    for (int64_t c = lane; c < d; c += kWarp) {
      const double shift = centre ? centre[batch * d + c] : 0.0;
      largest = fmax(largest, fabs(static_cast<double>(x[(batch * rows + row) * d + c]) - shift));
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  if (lane == 0) largest_of[warp] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) largest = fmax(largest, largest_of[w]);
    atomicMax(extent + 2 * batch, static_cast<Extent>(__double_as_longlong(largest)));
  }
}

// Points in panels, [panel][feature][kTile], so that the filter copies them to shared memory as they lie, and the two
// numbers of each point that bounds are made of (filter.cuh), for one precision after the other.
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    panel_kernel(Problem p, const S* x, const double* centre, const Extent* extent, bool is_column, float* panels,
                 float2* bounds, int64_t bounds_step) {
  constexpr int kWarps = kThreads / kWarp, kRowsPerWarp = kStripRows / kWarps;
  __shared__ float strip[kStripRows][kWarp + 1];
  const int64_t count = is_column ? p.columns : p.rows;
  const int64_t strips = (is_column ? p.column_panels : p.row_panels) * (kTile / kStripRows);
  const int64_t batch = blockIdx.x / strips, first = blockIdx.x % strips * kStripRows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Units units = units_of<T>(p, extent, batch);
  const double factor = is_column ? units.column : units.row;

  const S* source[kRowsPerWarp];
  double norm[kRowsPerWarp] = {};
#pragma unroll
  for (int q = 0; q < kRowsPerWarp; ++q) {
    const int64_t position = first + warp * kRowsPerWarp + q;
    const int64_t point = is_column ? point_of_column(p, position) : point_of_row(p, position);
    source[q] = position < count ? x + (batch * count + point) * p.features : nullptr;
  }
  float* out = panels + (batch * strips * kStripRows + first) / kTile * p.depth * kTile + first % kTile;
  for (int64_t base = 0; base < p.depth; base += kWarp) {
    const int64_t c = base + lane;
#pragma unroll
    for (int q = 0; q < kRowsPerWarp; ++q) {
      float value = 0.0f;
      if (source[q] && c < p.features) {
        const double shift = centre ? centre[batch * p.features + c] : 0.0;
        value = static_cast<float>((static_cast<double>(source[q][c]) - shift) * factor);
      }
      norm[q] = fma(static_cast<double>(value), static_cast<double>(value), norm[q]);
      strip[warp * kRowsPerWarp + q][lane] = value;
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kRowsPerWarp; ++q) {
      const int64_t feature = base + warp * kRowsPerWarp + q;
      if (feature < p.depth) out[feature * kTile + lane] = strip[lane][warp * kRowsPerWarp + q];
    }
    __syncthreads();
  }
#pragma unroll
  for (int q = 0; q < kRowsPerWarp; ++q) {
    const double half = lanes_sum<kWarp>(norm[q]) / 2;
    float2* out = bounds + batch * strips * kStripRows + first + warp * kRowsPerWarp + q;
    if (lane >= kPrecisions) continue;
    const double epsilon = p.epsilon[lane];
    float2 bound;
    if (!source[q]) {
      bound.x = bound.y = __int_as_float(0x7FC00000);  // padding never passes: NaN <= limit is false for every limit
    } else if (p.metric == Metric::inner_product) {
      bound.x = bound.y = __double2float_ru(sqrt(2 * half * epsilon) + sqrt(p.slack));
    } else {
      bound.x = __double2float_rd(half * (1 - epsilon) - p.slack);
      bound.y = __double2float_ru(half * (1 + epsilon) + p.slack);
    }
    out[lane * bounds_step] = bound;
  }
}

}  // namespace lfm::knn
