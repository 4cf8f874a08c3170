// Attention of a step over one layer: shares of the work for threads, and merging what they found.
//
// Work is shared out with OpenMP, whose runtime torch has loaded already.
#pragma once

#include <omp.h>

#include <cmath>
#include <memory>
#include <vector>

#include <sgl_kernel/kvtuner/cpu/attend_types.h>
#include <sgl_kernel/kvtuner/cpu/store_out.h>

#include "schedule.h"

namespace kvtuner {

// Merges the partial results of one block of queries by their log-sum-exp.
inline void merge(const AttendCall& c, const WorkItem* items, int count) {
  const int dim = c.layer.head_dim, rows = (int)(items->token_end - items->token_begin) * c.group;
  std::vector<float> sum(dim);
  for (int r = 0; r < rows; ++r) {
    float running_max = -1e38f, total = 0.f;
    for (int i = 0; i < count; ++i) running_max = std::max(running_max, items[i].partial[(int64_t)rows * dim + r]);
    std::fill(sum.begin(), sum.end(), 0.f);
    for (int i = 0; i < count; ++i) {
      const float* p = items[i].partial;
      const float weight = std::exp2(p[(int64_t)rows * dim + r] - running_max);
      total += weight * p[(int64_t)rows * (dim + 1) + r];
      for (int d = 0; d < dim; ++d) sum[d] += weight * p[(int64_t)r * dim + d];
    }
    const int64_t row = c.requests[items->request].first_row + items->token_begin + r / c.group;
    store_out(c, row, items->kv_head * c.group + r % c.group, sum.data(), 1.f / total);
  }
}

inline void attend_step(const Body& body, const AttendCall& c, int64_t requests) {
  const int threads = omp_get_max_threads(), dim = c.layer.head_dim;
  Schedule plan = make_schedule(c, requests, threads);
  const std::unique_ptr<float[]> partials(new float[partial_floats(plan.partial_rows, dim)]);
  float* partial = partials.get();
  for (size_t m = 0; m < plan.first.size(); ++m)
    for (int i = plan.first[m]; i < plan.first[m] + plan.count[m]; ++i) {
      plan.items[i].partial = partial;
      partial += partial_floats((plan.items[i].token_end - plan.items[i].token_begin) * c.group, dim);
    }
  const int64_t bytes = body.scratch_bytes(c);
  const bool merges = !plan.first.empty();
#pragma omp parallel num_threads(threads) if (plan.threads > 1)
  {
    static thread_local std::vector<char> scratch;
    if ((int64_t)scratch.size() < bytes + 64) scratch.resize(bytes + 64);
    void* aligned = (void*)(((uintptr_t)scratch.data() + 63) / 64 * 64);
    // Only merging needs everybody's results: each barrier saved is one less wait for a thread that lost its core.
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < (int64_t)plan.items.size(); ++i) body.attend(c, plan.items[i], aligned);
    if (merges) {
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t m = 0; m < (int64_t)plan.first.size(); ++m)
        merge(c, plan.items.data() + plan.first[m], plan.count[m]);
    }
  }
}

}  // namespace kvtuner
