// SPDX-License-Identifier: Apache-2.0
// attend, host side: parameters and the choice of the shape's kernel.
#include "cuda/attend.hpp"

#include "cuda/attend_room.cuh"
#include "cuda/dispatch.hpp"

namespace kvarn::cuda {
namespace {

constexpr int aligned(int64_t bytes) { return static_cast<int>((bytes + 127) / 128 * 128); }

// Works out the rest of a division; false if it needs more than `limit` bytes.
bool fits(const kvarn_layout& layout, int limit, Division& d) {
  const int keys = slot_bytes(layout, key_part(layout)), values = slot_bytes(layout, value_part(layout));
  const int state = static_cast<int>(state_bytes(layout.head_dim)), queries = query_bytes(layout.head_dim);
  if (d.teams * d.key_depth > kMaxSlots || d.states > kMaxStates) return false;
  d.queries_at = aligned(sizeof(Room));
  d.states_at = d.queries_at + aligned(std::max(d.quads() * queries, d.team_quads() * state));
  d.keys_at = d.states_at + aligned(int64_t{d.states} * d.quads() * state);
  d.values_at = d.keys_at + d.teams * d.key_depth * keys;
  const int end = d.values_at + d.teams * d.value_depth * values;
  // The end of the CTA needs no slots, but the states.
  const int ending = static_cast<int>(sizeof(Ending));
  d.bytes = std::max(end, d.keys_at + ending);
  d.ending_at = d.bytes - ending;
  return d.bytes <= limit;
}

}  // namespace

cudaError_t divide(const kvarn_layout& layout, int32_t columns, Division& division) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  // A warp of two quads unpacks codes once for both but is slower, 1.4 times as many instructions a tile: worth it
  // where a team has more than one such warp (docs/kernels.md).
  const int warp_quads = columns > 2 * kQuadColumns ? 2 : 1;
  const int team_warps = columns / (kQuadColumns * warp_quads);
  Division d{};
  const auto use = [&](int teams, int states, int key_depth, int value_depth) {
    Division wanted{};
    wanted.team_warps = team_warps, wanted.warp_quads = warp_quads, wanted.teams = teams, wanted.states = states;
    wanted.key_depth = key_depth, wanted.value_depth = value_depth;
    if (!fits(layout, limit, wanted)) return false;
    d = wanted;
    return true;
  };
  // As many teams as there are warps for; room for what most lists are left with; then steps in flight, K parts first:
  // while the one is computed the next is there; then more room.
  int teams = kComputingWarps / team_warps;
  while (teams > 0 && !use(teams, 1, 1, 1)) --teams;
  if (teams == 0) return cudaErrorInvalidConfiguration;
  while (d.states < 4 / warp_quads && use(teams, d.states + 1, 1, 1)) {
  }
  for (int depth = 1; depth < kPieceTiles; ++depth)
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
  p.heads = layout.kv_heads;
  p.group = static_cast<int32_t>(q.heads) / layout.kv_heads;
  p.window = attention.window;
  p.max_parts = launch.map.max_parts;
  p.factor = attention.scale * kLog2e;
  p.cap = attention.soft_cap * kLog2e;
  p.cap_inverse = p.cap > 0 ? 2 * kLog2e / p.cap : 0;
  const int32_t columns = block_columns(layout, static_cast<int32_t>(q.heads), launch.step.max_query_len);
  if (const cudaError_t error = divide(layout, columns, p.in); error != cudaSuccess) return error;
  return dispatch(layout, [&](auto shape) { return attend_shape<decltype(shape)>(p, launch.ctas, launch.stream); });
}

}  // namespace kvarn::cuda
