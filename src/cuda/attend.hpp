// SPDX-License-Identifier: Apache-2.0
// The parameters of attention's kernel, how a CTA is divided, and the kernel's instances.
#pragma once

#include "cuda/launch.hpp"
#include "cuda/shape.hpp"

namespace kvarn::cuda {

// Of a CTA: columns of a block; warps that compute; warps that share a step, and the quads of columns of each; such
// teams; steps in flight of a team, K parts and V parts; partial results of a quad for which there is room; where each
// begins in shared memory, and how much that is.
struct Division {
  int32_t columns, warps, team_warps, warp_quads, teams, key_depth, value_depth, states;
  int32_t queries_at, states_at, keys_at, values_at, ending_at, bytes;

  constexpr int32_t team_quads() const { return team_warps * warp_quads; }
  constexpr int32_t quads() const { return teams * team_quads(); }
};
// For rows of up to max_query_len tokens, on the current device. The plan cuts the work by it, attend runs by it.
cudaError_t divide(const kvarn_layout& layout, int32_t query_heads, int32_t max_query_len, Division& division);

struct AttendParameters {
  Plan plan;
  uint8_t* pages;
  int64_t page_count, page_stride;
  const int32_t* block_table;
  int64_t table_stride;
  kvarn_rows q;
  kvarn_rows_out out;
  const int32_t* query_starts;
  const float *sinks, *balance;  // of query heads; of KV heads' channels
  int32_t requests, tokens, heads, group, window, max_parts;
  float factor, cap, cap_inverse;  // scale and soft cap in log2 units; 2 log2(e) / cap
  Division in;
};

template <class S>
cudaError_t attend_shape(const AttendParameters& p, int32_t ctas, cudaStream_t stream);

}  // namespace kvarn::cuda
