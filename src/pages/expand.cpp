// SPDX-License-Identifier: Apache-2.0
// expand: the dequantized tiles of each request, one request after the other (specification section 10).
#include "pages/expand.hpp"

namespace kvarn {

void expand(const Step& step, Scratch* scratch, const Kernels& kernels, const kvarn_executor* executor,
            const kvarn_rows_out& k, const kvarn_rows_out& v) {
  const kvarn_layout& layout = step.layout;
  const int32_t heads = layout.kv_heads, tokens = layout.page_tokens, head_dim = layout.head_dim;
  int64_t tiles = 0;
  for (int32_t r = 0; r < step.batch.requests; ++r) tiles += step.tile_of(step.length(r));
  parallel_for(executor, tiles * heads, [&](int64_t index, int32_t thread) {
    const auto head = static_cast<int32_t>(index % heads);
    const int64_t out_tile = index / heads;
    int64_t tile = out_tile;
    int32_t r = 0;
    for (; tile >= step.tile_of(step.length(r)); ++r) tile -= step.tile_of(step.length(r));
    Scratch& own = scratch[thread];
    kernels.expand(layout, step.region(r, static_cast<int32_t>(tile), head), own.k, own.v, own);
    for (int32_t t = 0; t < tokens; ++t) {
      kernels.store(own.k + t * head_dim, head_dim, row_at(k, out_tile * tokens + t, head), k.dtype);
      kernels.store(own.v + t * head_dim, head_dim, row_at(v, out_tile * tokens + t, head), v.dtype);
    }
  });
}

}  // namespace kvarn
