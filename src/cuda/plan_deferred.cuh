// SPDX-License-Identifier: Apache-2.0
// The tiles that append leaves to pack, since no row of the step reads them packed: a tile that ends with its request's
// last row is read raw by it, and by nobody else, unless prefix caching has handed its page to another request in the
// very step that fills it.
#pragma once

#include "cuda/plan_inputs.cuh"

namespace kvarn::cuda {

// By the whole CTA. plan.deferred has `count` requests whose last rows complete a tile; those stay that nobody else is
// in the way of. Returns how many.
template <int kThreads>
__device__ inline int32_t settle_deferred(const PlanInputs& in, const Plan& plan, int32_t count) {
  __shared__ int32_t kept;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t requests = in.batch.requests;
  if (thread == 0) kept = 0;
  for (int64_t i = thread; i < int64_t{count} * requests; i += kThreads) {
    const int32_t request = plan.deferred[i / requests], other = static_cast<int32_t>(i % requests);
    const int32_t length = plan.requests[request].length, tile = length / in.layout.page_tokens - 1;
    const auto page = [&](int32_t r) { return in.batch.block_table[r * in.batch.table_stride + tile]; };
    if (other != request && plan.requests[other].length > length - in.layout.page_tokens &&
        page(other) == page(request))
      plan.requests[request].deferred = 0;
  }
  __syncthreads();
  for (int32_t base = 0; base < count; base += kThreads) {
    const int32_t request = base + thread < count ? plan.deferred[base + thread] : -1;
    __syncthreads();  // what the next line overwrites was read
    if (request >= 0 && plan.requests[request].deferred != 0) plan.deferred[atomicAdd(&kept, 1)] = request;
  }
  __syncthreads();
  return kept;
}

}  // namespace kvarn::cuda
