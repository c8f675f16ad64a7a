// SPDX-License-Identifier: Apache-2.0
// What a block of a request's columns reads: packed tiles, then the own tile or two.
#pragma once

#include "cuda/attend_order.cuh"
#include "cuda/plan_inputs.cuh"

namespace kvarn::cuda {

// The block of that index among those of the request, whose query tiles begin at r.first_tile of `tiles`.
__device__ inline BlockPlan block_of(const PlanInputs& in, const RequestPlan& r, int32_t request, int32_t index,
                                     const TilePlan* tiles) {
  BlockPlan b{};
  const int32_t page_tokens = in.layout.page_tokens;
  b.request = request;
  b.row = r.first_row;
  b.start = r.length - r.queries;
  b.first_column = index * in.columns;
  b.columns = min(in.columns, r.queries * in.group - b.first_column);
  const int32_t first = b.start + b.first_column / in.group, last = last_position(b, in.group);
  b.own_tile = first / page_tokens;
  b.own_tiles = last / page_tokens - b.own_tile + 1;
  b.end_tile = b.own_tile + b.own_tiles - 1;
  b.first_tile = in.window > 0 ? max(0, first - in.window + 1) / page_tokens : 0;
  b.steps = packed_steps(b);
  for (int i = 0; i < b.own_tiles; ++i) {
    const int32_t raw = raw_step(in.layout), steps = (own_tokens(b, page_tokens, last, i) + raw - 1) / raw;
    b.steps += steps;
    if (i == 0) b.own_steps = steps;
    b.raw[i] = tiles[r.first_tile + b.own_tile + i - b.start / page_tokens].raw;
  }
  return b;
}

}  // namespace kvarn::cuda
