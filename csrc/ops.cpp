// The CPU kernels, one line an operator, in the order of the flow. The schemas stand beside the reference twins in
// lfm_torch/ops/<name>.py, so that the operators exist with and without this library; the CUDA library attaches its
// kernels the same way, each at the end of its own *_cuda.cu. The kernels of lfm_torch/ops/<name>.py are in the folder
// <name>, those of recurrence.py in laplacian.
#include <torch/csrc/stable/library.h>

#include "geodesic/geodesic.h"
#include "graphs/graphs.h"
#include "knn/knn.h"
#include "krylov/krylov.h"
#include "laplacian/laplacian.h"
#include "maps/maps.h"

STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CPU, m) {
  m.impl("knn", TORCH_BOX(&lfm::knn_cpu));
  m.impl("knn_ragged", TORCH_BOX(&lfm::knn_ragged_cpu));
  m.impl("symmetrize_edges", TORCH_BOX(&lfm::symmetrize_edges_cpu));
  m.impl("symmetrize_edges_backward", TORCH_BOX(&lfm::symmetrize_edges_backward_cpu));
  m.impl("connected_components", TORCH_BOX(&lfm::connected_components_cpu));
  m.impl("geodesics", TORCH_BOX(&lfm::geodesics_cpu));
  m.impl("laplacian_product", TORCH_BOX(&lfm::laplacian_product_cpu));
  m.impl("laplacian_recurrence", TORCH_BOX(&lfm::laplacian_recurrence_cpu));
  m.impl("batched_eigh", TORCH_BOX(&lfm::batched_eigh_cpu));
  m.impl("orthonormalize_block", TORCH_BOX(&lfm::orthonormalize_block_cpu));
  m.impl("edge_products", TORCH_BOX(&lfm::edge_products_cpu));
  m.impl("inner_products", TORCH_BOX(&lfm::inner_products_cpu));
  m.impl("map_energies", TORCH_BOX(&lfm::map_energies_cpu));
}
