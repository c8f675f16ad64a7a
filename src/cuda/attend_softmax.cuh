// SPDX-License-Identifier: Apache-2.0
// The softmax of one step, packed or raw: a unit of its own, weights in it, their sum, and how it enters the running
// one (attend_state.cuh). A lane has scores of one column in rows that lie over its g, as MMAs leave them.
#pragma once

#include "cuda/attend_state.cuh"

namespace kvarn::cuda {

__device__ inline float over_rows(float x, float (*op)(float, float)) {
  x = op(x, __shfl_xor_sync(~0u, x, 4));
  x = op(x, __shfl_xor_sync(~0u, x, 8));
  return op(x, __shfl_xor_sync(~0u, x, 16));
}
__device__ inline float max_of(float a, float b) { return fmaxf(a, b); }
__device__ inline float sum_of(float a, float b) { return a + b; }

struct StepSum {
  float m, l;
};

// p = 2^(y - m) in place, m the tile's own unit: the integer above its largest score; l their sum.
template <int kRowTiles>
__device__ inline StepSum softmax(float (&y)[kRowTiles][2]) {
  float largest = fmaxf(y[0][0], y[0][1]);
#pragma unroll
  for (int t = 1; t < kRowTiles; ++t) largest = fmaxf(largest, fmaxf(y[t][0], y[t][1]));
  const float m = fmaxf(ceilf(over_rows(largest, max_of)), kEmpty);
  float sum[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      y[t][h] = exp2_fast(y[t][h] - m);
      sum[h] += y[t][h];
    }
  return {m, over_rows(sum[0] + sum[1], sum_of)};
}

// Takes m and l of a step into the state; the state's sums take their factor, and that of the step's is returned. The
// unit changes exactly, so the sums are only touched when some column's does: what fold_value does, for no -0 is among
// them.
template <int kSlices>
__device__ inline float begin_step(State<kSlices>& state, const StepSum& step) {
  const FoldFactors f = fold_factors(state.m, step.m);
  state.m = f.m;
  state.l = fold_value(state.l, step.l, f);
  if (__any_sync(~0u, f.a != 1.0f)) {
#pragma unroll
    for (float& x : state.out) x = __fmaf_rn(x, f.a, 0.0f);
  }
  return f.b;
}

}  // namespace kvarn::cuda
