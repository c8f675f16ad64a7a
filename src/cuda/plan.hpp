// SPDX-License-Identifier: Apache-2.0
// The plan of a step: what the lengths, the query ranges and the slots mean, worked out once on the device for all
// layers; and the map of the workspace that holds it.
#pragma once

#include <algorithm>
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
  int32_t length;                 // of the request after this step
  int32_t first_column, columns;  // column c of a request: row c / group, head c % group
  int32_t first_tile, end_tile;   // packed tiles first .. end-1 are read
  int32_t own_tile, own_tiles;    // raw: the tile of the first row, and 2 if the rows lie in two
  int32_t raw[2];                 // where those are: slots of the workspace, or -1 for the pages
  int32_t units, units_before;    // pieces of one KV head; of the blocks before, all KV heads
  int64_t cost_before;            // bytes of the blocks before, all KV heads
};
static_assert(sizeof(BlockPlan) == 64);

// Where attention's CTA begins in the order (block, KV head, unit); entry [ctas] is the end.
struct Cut {
  int32_t block, head, unit;
  int32_t units;  // of this CTA
};

struct PlanHeader {
  int32_t tiles, raw_tiles, blocks;
  int32_t packs;  // tiles that complete in this step
};

// Pieces of the history that one warp chains; fixed, so that no result depends on how the work is cut.
inline constexpr int kPieceTiles = 4;                      // packed tiles of a piece, at absolute tile numbers
inline constexpr int kRawStep = 16;                        // raw tokens in place of a tile
inline constexpr int kRawTokens = kPieceTiles * kRawStep;  // of a piece
inline constexpr int kFoldPieces = 8;                      // pieces of a group, and groups of a chapter
inline constexpr int kMinBlockColumns = 4, kMaxBlockColumns = 16;

// Columns of a block: as many as the largest request of the step needs, in steps that there are kernels for.
constexpr int32_t block_columns(const kvarn_layout& layout, int32_t query_heads, int32_t max_query_len) {
  const int64_t columns = int64_t{max_query_len} * (query_heads / layout.kv_heads);
  const int32_t most = layout.head_dim > 128 ? 8 : kMaxBlockColumns;
  int32_t size = kMinBlockColumns;
  while (size < columns && size < most) size *= 2;
  return size;
}

// Partial results that one CTA may leave: of a segment it does not begin, single pieces up to a group's edge, groups up
// to a chapter's edge, chapters, and what is left; pieces of up to two own tiles; and as much of one it does not end.
constexpr int64_t most_parts(const kvarn_layout& layout, int64_t max_seq_len) {
  const int64_t pieces = max_seq_len / (int64_t{layout.page_tokens} * kPieceTiles) + 1;
  return 2 * (kFoldPieces - 1) + pieces / (kFoldPieces * kFoldPieces) + 2 + 2 * (layout.page_tokens / kRawTokens) + 5;
}

// Room for one of them: sums, unit and value of every column, and how it is folded.
constexpr int64_t part_bytes(int32_t head_dim) { return int64_t{4} * kMaxBlockColumns * (head_dim + 2) + 64; }

// Byte offsets into the workspace; the same for everybody who has the same layout and limits.
struct WorkspaceMap {
  int64_t header, requests, tiles, blocks, cuts, counters, parts, raw, bytes;
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
constexpr int64_t raw_tile_bytes(const kvarn_layout& layout) {  // of one KV head: K [G][D], then V [G][D], f16
  return int64_t{4} * layout.page_tokens * layout.head_dim;
}

// Device pointers into the workspace.
struct Plan {
  PlanHeader* header;
  RequestPlan* requests;
  TilePlan* tiles;
  BlockPlan* blocks;
  Cut* cuts;
  uint32_t* counters;  // [ctas] 0 between launches
  float* parts;        // [ctas][max_parts]: partial results of segments that several CTAs share
  uint16_t* raw;       // [raw tile][kv_heads][2][G][D] f16, rotated
};

}  // namespace kvarn::cuda
