// SPDX-License-Identifier: Apache-2.0
// The workspace of a step: raw rows that have no place in pages, scratch per thread, and the parts of long rows.
// append and attend derive the same map from the same batch, so attend finds what append left.
#pragma once

#include "pages/step.hpp"

namespace kvarn {

inline constexpr int kSegmentTiles = 32;   // a row's history is cut at fixed tiles and folded in order
inline constexpr int kUnitsPerThread = 4;  // below this many units a thread, rows are split into segments

// Written by append, checked by attend: is this the workspace of this step and layer?
struct StepHeader {
  uint64_t magic, fingerprint;
};

// Up to kMaxColumns / group rows of one request that lie in the same tile: what one unit of attention computes per KV
// head.
struct RowBlock {
  int32_t request, first, rows, tile;
};

struct WorkspaceMap {
  int64_t header, row_base, rows, scratch, blocks, parts, bytes;

  // `raw_rows` new and staged tokens, `tokens` new ones; `part_columns` columns of split rows, one per segment and
  // column.
  static WorkspaceMap make(const kvarn_layout& layout, int64_t raw_rows, int64_t tokens, int64_t requests,
                           int32_t threads, int64_t part_columns) {
    WorkspaceMap map{};
    int64_t offset = 0;
    const auto take = [&offset](int64_t bytes) {
      const int64_t start = offset;
      offset += (bytes + 63) / 64 * 64;
      return start;
    };
    map.header = take(sizeof(StepHeader));
    map.row_base = take(requests * int64_t{sizeof(int64_t)});
    map.rows = take(raw_rows * layout.kv_heads * 2 * layout.head_dim * 2);
    map.scratch = take(threads * int64_t{sizeof(Scratch)});
    map.blocks = take(tokens * int64_t{sizeof(RowBlock)});
    map.parts = take(part_columns * (layout.head_dim + 2) * int64_t{sizeof(float)});
    map.bytes = offset;
    return map;
  }
};

struct Workspace {
  uint8_t* data;
  WorkspaceMap map;
  const kvarn_layout& layout;

  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(data + offset);
  }
  StepHeader& header() const { return *at<StepHeader>(map.header); }
  int64_t* row_base() const { return at<int64_t>(map.row_base); }
  Scratch& scratch(int32_t thread) const { return at<Scratch>(map.scratch)[thread]; }
  RowBlock* blocks() const { return at<RowBlock>(map.blocks); }
  // K of the raw row of (workspace row, head); V follows head_dim elements behind.
  uint16_t* row(int64_t row, int32_t head) const {
    return at<uint16_t>(map.rows) + (row * layout.kv_heads + head) * 2 * layout.head_dim;
  }
};

inline constexpr uint64_t kStepMagic = 0x6b7661726e303031;  // "kvarn001"

uint64_t fingerprint(const Step& step);
// Row of the workspace where request r's first token of this step (its first staged one, if any) lies.
void fill_row_base(const Step& step, int64_t* row_base);
// The first `tokens` raw tokens of a tile, wherever they are.
RawTile raw_tile(const Step& step, const Workspace& workspace, int32_t request, int32_t tile, int32_t head,
                 int32_t tokens);

}  // namespace kvarn
