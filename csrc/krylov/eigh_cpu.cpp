// batched_eigh: torch's eigh, one matrix a thread. It takes the matrices of a batch one after the other, and a small
// one leaves most threads idle. The routine is that of `batched_eigh_reference`; a task writes to its own matrix.
#include <torch/csrc/stable/ops.h>

#include <array>

#include "krylov/krylov.h"
#include "parallel.h"

namespace lfm {
namespace {

// Writes the decomposition of one matrix; false where LAPACK fails.
bool decompose(const Tensor& matrix, Tensor evals, Tensor evecs) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(matrix), torch::stable::detail::from(std::string("L"))};
  if (torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION) != 0) return false;
  torch::stable::copy_(evals, torch::stable::detail::to<Tensor>(stack[0]));
  torch::stable::copy_(evecs, torch::stable::detail::to<Tensor>(stack[1]));
  return true;
}

}  // namespace

std::tuple<Tensor, Tensor> batched_eigh_cpu(Tensor matrices) {
  check_dim("matrices", matrices, 3);
  check_floating("matrices", matrices);
  const int64_t count = matrices.size(0), n = matrices.size(1);
  check_size("matrices", matrices, 2, n);
  Tensor evals = torch::stable::new_empty(matrices, {count, n}),
         evecs = torch::stable::new_empty(matrices, {count, n, n});
  std::atomic<int64_t> failed{-1};
  parallel_tasks(count, [&](int64_t i) {
    Tensor matrix = matrices, w = evals, v = evecs;
    if (!decompose(torch::stable::select(matrix, 0, i), torch::stable::select(w, 0, i), torch::stable::select(v, 0, i)))
      failed = i;
  });
  LFM_CHECK(failed < 0, "matrices must have eigenvectors that LAPACK finds, it failed at number ", failed.load(),
            " (are there values that are not finite?)");
  return {evals, evecs};
}

}  // namespace lfm
