// SPDX-License-Identifier: Apache-2.0
// The parameters of attention's kernel, and its instances.
#pragma once

#include "cuda/launch.hpp"
#include "cuda/shape.hpp"

namespace kvarn::cuda {

struct AttendParameters {
  Plan plan;
  uint8_t* pages;
  int64_t page_count, page_stride;
  const int32_t* block_table;
  int64_t table_stride;
  kvarn_rows q;
  kvarn_rows_out out;
  const int32_t* query_starts;
  const float* sinks;
  int32_t requests, tokens, heads, group, window, max_parts;
  float factor, cap, cap_inverse;  // scale and soft cap in log2 units; 2 log2(e) / cap
  // Of a CTA: warps that share a step, each with four columns; such teams; steps in flight of a team, K parts and V
  // parts; runs whose results wait to be folded.
  int32_t team_warps, teams, key_depth, value_depth, results;
};

// columns: of a block, 4, 8 or 16.
template <class S>
cudaError_t attend_shape(AttendParameters p, int32_t columns, int32_t ctas, cudaStream_t stream);

}  // namespace kvarn::cuda
