// Work shared out over torch's own thread pool, for the CPU kernels of all stages. Every task is run once, by one
// thread; which one, and in what order, is open. Results are therefore the same for any number of threads where a task
// writes to places of its own and its sums do not depend on how the work was cut.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lfm {

// Calls body(task) for every task in [0, tasks), handed out one at a time, so that unequal tasks and busy cores
// balance. The body must not throw and must not depend on the order.
template <class Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    // a worker may be given several of the outer indices; after the first the tasks are used up
    for (int64_t task = next++; task < tasks; task = next++) body(task);
  });
}

}  // namespace lfm
