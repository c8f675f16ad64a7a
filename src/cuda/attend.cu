// SPDX-License-Identifier: Apache-2.0
// attend, host side: parameters and the choice of the shape's kernel.
#include "cuda/attend.hpp"

#include "cuda/attend_division.cuh"
#include "cuda/dispatch.hpp"
#include "cuda/gpu.hpp"

namespace kvarn::cuda {
cudaError_t divide(const kvarn_layout& layout, int32_t query_heads, int32_t max_query_len, Division& division) {
  Gpu gpu;
  if (const cudaError_t error = current_gpu(gpu); error != cudaSuccess) return error;
  const int32_t columns = block_columns(layout, query_heads, max_query_len), warps = computing_warps(layout, columns);
  Division d{};
  const auto use = [&](int32_t teams, int32_t states, int32_t key_depth, int32_t value_depth) {
    const Division wanted =
        division_of(layout, columns, gpu.shared_bytes, warps, teams, states, key_depth, value_depth);
    if (wanted.teams > 0) d = wanted;
    return wanted.teams > 0;
  };
  // As many teams as there are warps for; room for what most lists are left with, the more the more lists there are;
  // then steps in flight, K parts first: while the one is computed the next is there; then more room.
  int32_t teams = most_teams(warps, columns);
  while (teams > 0 && !use(teams, 1, 1, 1)) --teams;
  if (teams == 0) return cudaErrorInvalidConfiguration;
  const int32_t states = columns == kQuadColumns ? 4 : 2;
  while (d.states < states && use(teams, d.states + 1, 1, 1)) {
  }
  for (int32_t depth = 1; depth < kPieceTiles; ++depth)
    if (!use(teams, d.states, depth + 1, depth) || !use(teams, d.states, depth + 1, depth + 1)) break;
  while (use(teams, d.states + 1, d.key_depth, d.value_depth)) {
  }
  division = d;
  return cudaSuccess;
}

cudaError_t attend(const Launch& launch, const kvarn_rows& q, const kvarn_rows_out& out,
                   const kvarn_cuda_attention& attention) {
  constexpr float kLog2e = 1.44269504f;
  const kvarn_layout& layout = launch.layout;
  const kvarn_batch& batch = launch.step.batch;
  AttendParameters p{};
  p.plan = launch.plan();
  p.pages = launch.pages.data;
  p.page_count = launch.pages.count;
  p.page_stride = launch.pages.stride;
  p.block_table = batch.block_table;
  p.table_stride = batch.table_stride;
  p.query_starts = batch.query_starts;
  p.requests = batch.requests;
  p.tokens = launch.step.tokens;
  p.q = q;
  p.out = out;
  p.sinks = attention.sinks;
  p.balance = attention.balance;
  p.heads = layout.kv_heads;
  p.group = static_cast<int32_t>(q.heads) / layout.kv_heads;
  p.window = attention.window;
  p.max_parts = launch.map.max_parts;
  p.factor = attention.scale * kLog2e;
  p.cap = attention.soft_cap * kLog2e;
  p.cap_inverse = p.cap > 0 ? 2 * kLog2e / p.cap : 0;
  const cudaError_t error = divide(layout, static_cast<int32_t>(q.heads), launch.step.max_query_len, p.in);
  if (error != cudaSuccess) return error;
  return dispatch(layout, [&](auto shape) { return attend_shape<decltype(shape)>(p, launch.ctas, launch.stream); });
}

}  // namespace kvarn::cuda
