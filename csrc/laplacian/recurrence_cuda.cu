// laplacian_recurrence on the GPU: one product a step, so that the launches of a polynomial follow each other without a
// word from Python. Within rounding of `laplacian_recurrence_reference`; devices are checked by the products.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "laplacian/laplacian.h"

namespace lfm {
namespace {

Tensor laplacian_recurrence_cuda(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right,
                                 Tensor x, Tensor coefficients, int64_t graphs) {
  check_recurrence(rowptr, col, weight, diagonal, left, right, x, coefficients, graphs);
  const double* abc = coefficients.const_data_ptr<double>();
  Tensor previous = x, current = x;
  for (int64_t k = 0; k < coefficients.size(0); ++k, abc += 3) {
    std::optional<Tensor> z;
    if (k > 0 && abc[2] != 0) z = previous;
    Tensor next =
        laplacian_product_cuda(rowptr, col, weight, diagonal, left, right, current, z, abc[0], abc[1], abc[2]);
    previous = current;
    current = next;
  }
  return coefficients.size(0) == 0 ? torch::stable::clone(x) : current;
}

}  // namespace
}  // namespace lfm

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m) {
  m.impl("laplacian_recurrence", TORCH_BOX(&lfm::laplacian_recurrence_cuda));
}
