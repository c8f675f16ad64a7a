// SPDX-License-Identifier: Apache-2.0
// attend: query rows against packed tiles and their own raw tile (specification section 9).
//
// A unit is (row block, KV head). Its chain over tiles restarts at every segment of 32 tiles and the segments are
// folded in order, whether one thread runs them all or several share them: so splitting never changes a bit.
#include "pages/attend.hpp"

#include <cstring>
#include <limits>

namespace kvarn {
namespace {

constexpr float kLog2e = 1.44269504f;

struct Attend {
  const Step& step;
  const Workspace& workspace;
  const Kernels& kernels;
  const kvarn_rows& q;
  const kvarn_rows_out& out;
  float factor, cap;  // scale and soft cap in log2 units
  const float* balance;

  int32_t group() const { return static_cast<int32_t>(q.heads) / step.layout.kv_heads; }
  int32_t segments(const RowBlock& block) const { return block.tile / kSegmentTiles + 1; }
  int32_t columns(const RowBlock& block) const { return block.rows * group(); }

  // The vector of a column in q or out.
  template <class Rows>
  auto* column_of(const Rows& rows, const RowBlock& block, int32_t head, int32_t column) const {
    return row_at(rows, block.first + column / group(), int64_t{head} * group() + column % group());
  }

  // A segment's first record is on its way while the queries are rotated; each later one is fetched by the one before.
  void prefetch_first(const RowBlock& block, int32_t head, int32_t segment) const {
    if (segment * kSegmentTiles >= block.tile) return;
    const uint8_t* record = step.region(block.request, segment * kSegmentTiles, head);
    for (int64_t i = 0; i < step.layout.record_bytes; i += 64) __builtin_prefetch(record + i);
  }

  void load_queries(const RowBlock& block, int32_t head, Scratch& scratch, bool* finite) const {
    const int32_t head_dim = step.layout.head_dim;
    const float* of_head = balance_of(step.layout, balance, head);
    for (int32_t c = 0; c < columns(block); ++c)
      finite[c] = kernels.load_query(column_of(q, block, head, c), q.dtype, head_dim, of_head, factor,
                                     scratch.q + c * head_dim);
  }

  // The chain of one segment, from empty. A query that is not finite makes its own row NaN and nothing else.
  void run_segment(const RowBlock& block, int32_t head, int32_t segment, const bool* finite, const Columns& part,
                   Scratch& scratch) const {
    const kvarn_layout& layout = step.layout;
    part.reset(layout.head_dim);
    for (int32_t c = 0; c < part.count; ++c)
      if (!finite[c]) part.sum[c] = std::numeric_limits<float>::quiet_NaN();
    const int32_t begin = segment * kSegmentTiles, end = std::min(begin + kSegmentTiles, block.tile);
    for (int32_t tile = begin; tile < end; ++tile) {
      const uint8_t* next = step.region(block.request, std::min(tile + 1, end - 1), head);
      kernels.attend_packed(layout, step.region(block.request, tile, head), next, part, cap, scratch);
    }
    if (segment != block.tile / kSegmentTiles) return;

    int32_t visible[kMaxColumns];
    const int32_t first_position = step.start(block.request) + block.first - step.batch.query_starts[block.request];
    for (int32_t c = 0; c < part.count; ++c) visible[c] = (first_position + c / group()) % layout.page_tokens + 1;
    const RawTile raw = raw_tile(step, workspace, block.request, block.tile, head, visible[part.count - 1]);
    kernels.attend_raw(layout, raw, visible, part, cap, scratch);
  }

  void finish(const RowBlock& block, int32_t head, const Columns& total) const {
    for (int32_t c = 0; c < total.count; ++c)
      kernels.finish(total, c, step.layout.head_dim, column_of(out, block, head, c), out.dtype);
  }

  Columns total_of(const RowBlock& block, Scratch& scratch) const {
    const Columns total{columns(block), nullptr, scratch.total, scratch.state[0], scratch.state[1]};
    total.reset(step.layout.head_dim);
    return total;
  }

  void run_whole(const RowBlock& block, int32_t head, Scratch& scratch) const {
    bool finite[kMaxColumns];
    prefetch_first(block, head, 0);
    load_queries(block, head, scratch, finite);
    const Columns total = total_of(block, scratch);
    const Columns part{total.count, scratch.q, scratch.out, scratch.state[2], scratch.state[3]};
    for (int32_t s = 0; s < segments(block); ++s) {
      run_segment(block, head, s, finite, part, scratch);
      kernels.fold(step.layout.head_dim, total, part);
    }
    finish(block, head, total);
  }

  // Parts in the workspace: per (unit, segment) kMaxColumns columns of out, then max and sum.
  Columns stored_part(int64_t index, const RowBlock& block, float* queries) const {
    const int32_t head_dim = step.layout.head_dim;
    float* base = workspace.at<float>(workspace.map.parts) + index * kMaxColumns * (head_dim + 2);
    return {columns(block), queries, base, base + kMaxColumns * head_dim, base + kMaxColumns * (head_dim + 1)};
  }
};

// Rows that no request owns, or whose request takes no part, are zeros.
void clear_absent(const Step& step, const kvarn_rows_out& out) {
  const auto bytes = static_cast<size_t>(step.layout.head_dim * element_bytes(out.dtype));
  for (int32_t r = 0; r < step.batch.requests; ++r) {
    if (step.length(r) > 0) continue;
    for (int64_t t = step.batch.query_starts[r]; t < step.batch.query_starts[r + 1]; ++t)
      for (int64_t h = 0; h < out.heads; ++h) std::memset(row_at(out, t, h), 0, bytes);
  }
}

}  // namespace

AttendPlan plan_attend(const Step& step, int64_t query_heads, int32_t threads, RowBlock* blocks) {
  const int32_t group = static_cast<int32_t>(query_heads) / step.layout.kv_heads;
  AttendPlan plan{0, 0, std::max(1, kMaxColumns / group), 1};
  int32_t last_tile = 0;
  for (int32_t r = 0; r < step.batch.requests; ++r) {
    for (int32_t position = step.start(r), end = step.length(r); position < end;) {
      const int32_t tile = step.tile_of(position), edge = std::min(end, (tile + 1) * step.layout.page_tokens);
      const int32_t rows = std::min(plan.rows_per_block, edge - position);
      if (blocks != nullptr)
        blocks[plan.blocks] = {r, step.batch.query_starts[r] + position - step.start(r), rows, tile};
      ++plan.blocks;
      position += rows;
      last_tile = std::max(last_tile, tile);
    }
  }
  plan.units = plan.blocks * step.layout.kv_heads;
  if (threads > 1 && plan.units < int64_t{kUnitsPerThread} * threads) plan.segments = last_tile / kSegmentTiles + 1;
  return plan;
}

void attend(const Step& step, const Workspace& workspace, const AttendPlan& plan, const Kernels& kernels,
            const kvarn_executor* executor, const kvarn_rows& q, const kvarn_rows_out& out, float scale, float soft_cap,
            const float* balance) {
  const Attend run{step, workspace, kernels, q, out, scale * kLog2e, soft_cap * kLog2e, balance};
  const RowBlock* blocks = workspace.blocks();
  const int32_t heads = step.layout.kv_heads;
  fill_row_base(step, workspace.row_base());
  clear_absent(step, out);
  if (plan.segments == 1) {
    // Prompts' last blocks are the dearest: start with them.
    parallel_for(executor, plan.units, [&](int64_t index, int32_t thread) {
      const int64_t unit = plan.units - 1 - index;
      run.run_whole(blocks[unit / heads], static_cast<int32_t>(unit % heads), workspace.scratch(thread));
    });
    return;
  }
  parallel_for(executor, plan.units * plan.segments, [&](int64_t index, int32_t thread) {
    const int64_t unit = index / plan.segments;
    const auto segment = static_cast<int32_t>(index % plan.segments), head = static_cast<int32_t>(unit % heads);
    const RowBlock& block = blocks[unit / heads];
    if (segment >= run.segments(block)) return;
    Scratch& scratch = workspace.scratch(thread);
    bool finite[kMaxColumns];
    run.prefetch_first(block, head, segment);
    run.load_queries(block, head, scratch, finite);
    run.run_segment(block, head, segment, finite, run.stored_part(index, block, scratch.q), scratch);
  });
  parallel_for(executor, plan.units, [&](int64_t unit, int32_t thread) {
    const RowBlock& block = blocks[unit / heads];
    const Columns total = run.total_of(block, workspace.scratch(thread));
    for (int32_t s = 0; s < run.segments(block); ++s)
      kernels.fold(step.layout.head_dim, total, run.stored_part(unit * plan.segments + s, block, nullptr));
    run.finish(block, static_cast<int32_t>(unit % heads), total);
  });
}

}  // namespace kvarn
