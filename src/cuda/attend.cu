// SPDX-License-Identifier: Apache-2.0
// attend, host side: parameters and the choice of the shape's kernel.
#include "cuda/attend.hpp"

#include "cuda/dispatch.hpp"

namespace kvarn::cuda {

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
  return dispatch(layout, [&](auto shape) {
    return attend_shape<decltype(shape)>(p, columns, launch.ctas, launch.stream);
  });
}

}  // namespace kvarn::cuda
