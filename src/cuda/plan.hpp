// SPDX-License-Identifier: Apache-2.0
// The plan of a step: what the lengths, the query ranges and the slots mean, worked out once on the device for all
// layers; and the map of the workspace that holds it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "format/layout.hpp"
#include "format/raw.hpp"
#include "kvarn/cuda.h"

namespace kvarn::cuda {

// A request's share of the step. queries 0: it takes no part.
struct RequestPlan {
  int32_t length, queries;  // after this step; rows of this step. start = length - queries
  int32_t first_row;        // in k, v, q
  int32_t first_tile;       // index into the plan's tiles of the tile that `start` lies in
  int32_t first_raw;        // raw slot of that tile, if its raw tokens have left the pages
  int32_t first_block;
  int32_t deferred;  // 1: the tile that its last row completes is left to pack
};

// A tile that has rows of this step ("query tile"), in the order of requests and positions.
struct TilePlan {
  int32_t request, tile;
  int32_t first_row, rows;  // of this step, in k, v, q
  int32_t raw;              // its slot among the workspace's raw tiles, or -1: its raw tokens are in the pages
};

// The columns (row x query head of one KV head's group) that one pass over the history serves, and what they read.
struct alignas(64) BlockPlan {
  int32_t request;
  int32_t row, start;             // the request's first row of this step in q, and its position
  int32_t first_column, columns;  // column c of a request: row c / group, head c % group
  int32_t first_tile, end_tile;   // packed tiles first .. end-1 are read, a step each
  int32_t own_tile, own_tiles;    // raw: the tile of the first row, and 2 if the rows lie in two
  int32_t raw[2];                 // where those are: slots of the workspace, or -1 for the pages
  int32_t own_steps;              // of the first own tile, raw_step() tokens each
  int32_t steps, steps_before;    // of one KV head; of the blocks before, all KV heads
  int64_t weight_before;          // of the blocks before, all KV heads
};
static_assert(sizeof(BlockPlan) == 64);

// Where a list of attention's work begins in the order (block, KV head, step): there is one list for every team of
// every CTA, and entry [lists] is the end.
struct alignas(16) Cut {
  int32_t block, head, step;
  int32_t number;  // of that step in the order
};

struct PlanHeader {
  int32_t tiles, raw_tiles, blocks;
  int32_t packs;     // tiles that complete in this step, less
  int32_t deferred;  // those that are left to pack
};

// What the order of additions is made of (attend_order.cuh).
inline constexpr int kPieceTiles = 4;  // packed tiles that are chained, at absolute tile numbers
// Rows of raw tokens in shared memory: 16 bytes apart beyond their length, so that 8 of them touch all banks.
constexpr int raw_row_bytes(int head_dim) { return 2 * head_dim + 16; }
// Raw tokens in place of a tile: 32 if their K fits where a tile's does.
constexpr int raw_step(const kvarn_layout& l) { return 32 * raw_row_bytes(l.head_dim) <= l.v_codes ? 32 : 16; }
// Of a step, as its time, and of a segment, whose queries are prepared first and which is finished.
inline constexpr int kPackedWeight = 2, kRawWeight = 3, kSegmentWeight = 3;
// Four columns are a quad: what one MMA multiplies, since a column takes two of its eight, and what one partial result
// is of. A computing warp has one quad, or two of blocks of 16: then it unpacks once for both.
inline constexpr int kQuadColumns = 4;
inline constexpr int kTwoQuadsHeadDim = 128;  // the largest of which a warp's registers hold two quads
// Columns of a block: 4, 8, 12, 16 or 20; of larger head dims 4 or 8.
inline constexpr int kMinBlockColumns = 4, kMaxBlockColumns = 20;
constexpr int most_block_columns(int32_t head_dim) { return head_dim > kTwoQuadsHeadDim ? 8 : kMaxBlockColumns; }
inline constexpr int kMaxComputingWarps = 16, kMaxQuads = 16;  // of a CTA of attention

// Partial results that a list, or a CTA, can be left with: the steps of a piece, pieces of rising and then of falling
// rank, and those of two own tiles.
constexpr int64_t most_parts(const kvarn_layout& layout, int64_t max_seq_len) {
  const int64_t pieces = max_seq_len / (int64_t{layout.page_tokens} * kPieceTiles) + 1;
  return 2 * static_cast<int64_t>(std::bit_width(static_cast<uint64_t>(pieces))) + 10;
}

// Room for one of them, of one quad: slices of 32 channels with unit and value of every column.
constexpr int64_t state_bytes(int32_t head_dim) { return head_dim / 32 * int64_t{4} * kQuadColumns * (32 + 2); }
// Of all columns of a block, each slice with its ranks.
constexpr int64_t part_bytes(int32_t head_dim) {
  return most_block_columns(head_dim) / kQuadColumns * (state_bytes(head_dim) + head_dim / 32 * 16);
}

// Byte offsets into the workspace; the same for everybody who has the same layout and limits.
struct WorkspaceMap {
  int64_t header, requests, deferred, layers, tiles, blocks, cuts, counters, parts, spilled, raw, bytes;
  int32_t max_tiles, max_raw_tiles, max_blocks, max_parts;

  static WorkspaceMap make(const kvarn_layout& layout, const kvarn_cuda_limits& limits, int32_t ctas);
};

// The most entries of a step; limits as in kvarn_cuda_limits.
constexpr int64_t most_tiles(const kvarn_layout& layout, int64_t tokens, int64_t requests) {
  return tokens / layout.page_tokens + 2 * requests;
}
// A tile has left the pages only if n + 1 or more rows of this step lie behind it.
constexpr int64_t most_raw_tiles(const kvarn_layout& layout, int64_t tokens, int64_t requests) {
  return tokens / layout.page_tokens + std::min<int64_t>(requests, tokens / (layout.raw_tokens_per_page + 2));
}
inline constexpr int kMostLayers = 512;                         // of one call of pack
constexpr int64_t raw_tile_bytes(const kvarn_layout& layout) {  // of one KV head: K [G][D], then V [G][D], f16
  return int64_t{4} * layout.page_tokens * layout.head_dim;
}

// Device pointers into the workspace.
struct Plan {
  PlanHeader* header;
  RequestPlan* requests;
  int32_t* deferred;         // [header->deferred] requests, in any order
  kvarn_cuda_layer* layers;  // [kMostLayers] of pack
  TilePlan* tiles;
  BlockPlan* blocks;
  Cut* cuts;
  uint32_t* counters;  // [ctas] 0 between launches
  uint8_t* parts;      // [ctas][max_parts]: partial results of segments that several CTAs share
  uint8_t* spilled;    // [ctas][max_parts][kMaxQuads]: what shared memory has no room for
  uint16_t* raw;       // [raw tile][kv_heads][2][G][D] f16, rotated
};

}  // namespace kvarn::cuda
