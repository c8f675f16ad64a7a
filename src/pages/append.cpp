// SPDX-License-Identifier: Apache-2.0
// append: stage, rotate, pack (specification section 8).
//
// Bytes: reads k and v of the step once, writes 4 D bytes a token and head, and per completed tile reads 4 D G and
// writes a record. The encoder dominates: 2.3 million operations a tile at k4v2, D = 128.
#include "pages/append.hpp"

#include <atomic>
#include <cstring>

namespace kvarn {
namespace {

struct Append {
  const Step& step;
  const Workspace& workspace;
  const Kernels& kernels;
  const kvarn_rows &k, &v;
  kvarn_encoder encoder;
  const float* feedback;
  const float* balance;

  // Copies the older raw tokens of the first tile away from the pages that this step overwrites.
  void stage(int32_t r, int32_t head) const {
    const int32_t count = step.staged(r), first = step.start(r) - count, head_dim = step.layout.head_dim;
    for (int32_t t = 0; t < count; ++t) {
      const uint16_t* from = step.raw_k(r, first + t, head);
      uint16_t* to = workspace.row(workspace.row_base()[r] + t, head);
      std::memcpy(to, from, 2 * static_cast<size_t>(head_dim));
      std::memcpy(to + head_dim, from + step.raw_v_distance(), 2 * static_cast<size_t>(head_dim));
    }
  }

  // Every new token to its raw place in the pages, or to the workspace when its tile completed and has none.
  int64_t rotate(int32_t r, int32_t head) const {
    const kvarn_layout& layout = step.layout;
    const int32_t start = step.start(r), count = step.queries(r);
    const float* of_head = balance_of(layout, balance, head);
    int64_t replaced = 0;
    for (int32_t i = 0; i < count; ++i) {
      const int64_t token = step.batch.query_starts[r] + i;
      const bool in_pages = format::raw_in_pages(layout, step.tile_of(start + i), step.length(r));
      uint16_t* to =
          in_pages ? step.raw_k(r, start + i, head) : workspace.row(workspace.row_base()[r] + step.staged(r) + i, head);
      const int64_t v_distance = in_pages ? step.raw_v_distance() : layout.head_dim;
      replaced += kernels.rotate_raw(row_at(k, token, head), k.dtype, layout.head_dim, of_head, to);
      replaced += kernels.rotate_raw(row_at(v, token, head), v.dtype, layout.head_dim, nullptr, to + v_distance);
    }
    return replaced;
  }

  void pack(int32_t r, int32_t tile, int32_t head, Scratch& scratch) const {
    const RawTile raw = raw_tile(step, workspace, r, tile, head, step.layout.page_tokens);
    const int64_t squared = int64_t{step.layout.head_dim} * step.layout.head_dim;
    const float* of_head = feedback == nullptr ? nullptr : feedback + head * squared;
    kernels.encode(step.layout, encoder, of_head, raw, step.region(r, tile, head), scratch);
  }
};

}  // namespace

int64_t append(const Step& step, const Workspace& workspace, const Kernels& kernels, const kvarn_executor* executor,
               const kvarn_rows& k, const kvarn_rows& v, kvarn_encoder encoder, const float* feedback,
               const float* balance) {
  const Append run{step, workspace, kernels, k, v, encoder, feedback, balance};
  const int32_t heads = step.layout.kv_heads;
  workspace.header() = {kStepMagic, fingerprint(step)};
  fill_row_base(step, workspace.row_base());

  std::atomic<int64_t> replaced = 0;
  parallel_for(executor, int64_t{step.batch.requests} * heads, [&](int64_t index, int32_t) {
    const auto r = static_cast<int32_t>(index / heads), head = static_cast<int32_t>(index % heads);
    if (step.queries(r) == 0) return;
    run.stage(r, head);
    replaced += run.rotate(r, head);
  });

  int64_t tiles = 0;
  for (int32_t r = 0; r < step.batch.requests; ++r) tiles += step.end_pack(r) - step.first_pack(r);
  parallel_for(executor, tiles * heads, [&](int64_t index, int32_t thread) {
    int64_t tile = index / heads;
    int32_t r = 0;
    for (; tile >= step.end_pack(r) - step.first_pack(r); ++r) tile -= step.end_pack(r) - step.first_pack(r);
    run.pack(r, step.first_pack(r) + static_cast<int32_t>(tile), static_cast<int32_t>(index % heads),
             workspace.scratch(thread));
  });
  return replaced;
}

}  // namespace kvarn
