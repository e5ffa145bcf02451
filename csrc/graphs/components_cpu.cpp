// connected_components: depth-first search by one thread. Once every node has been reached the remaining edges cannot
// change anything, so on the connected graphs that are the rule only a small part of the edges is read.
// The labels of `connected_components_reference`: components in the order of their smallest nodes. The graph is
// symmetric.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "graphs/graphs.h"

namespace lfm {

Tensor connected_components_cpu(Tensor rowptr, Tensor col) {
  check_csr(rowptr, col);
  const int64_t rows = rowptr.size(0) - 1;
  Tensor labels = torch::stable::new_empty(rowptr, {rows});
  int64_t* label = labels.mutable_data_ptr<int64_t>();
  const int64_t* pointer = rowptr.const_data_ptr<int64_t>();
  const int32_t* columns = col.const_data_ptr<int32_t>();
  std::fill(label, label + rows, -1);
  std::vector<int64_t> stack;
  int64_t reached = 0, component = 0;
  for (int64_t seed = 0; seed < rows && reached < rows; ++seed) {
    if (label[seed] >= 0) continue;
    label[seed] = component;
    ++reached;
    stack.assign(1, seed);
    while (!stack.empty() && reached < rows) {
      const int64_t i = stack.back();
      stack.pop_back();
      for (int64_t e = pointer[i], end = pointer[i + 1]; e < end; ++e) {
        const int64_t j = columns[e];
        if (label[j] >= 0) continue;
        label[j] = component;
        ++reached;
        stack.push_back(j);
      }
    }
    ++component;
  }
  return labels;
}

}  // namespace lfm
