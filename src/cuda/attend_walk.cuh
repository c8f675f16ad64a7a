// SPDX-License-Identifier: Apache-2.0
// What a warp reads, in order: the units (pieces) of a CTA's share, dealt to its warps in turn, and the steps of each: up
// to 4 packed tiles, or up to 2 times 16 raw tokens.
#pragma once

#include "cuda/attend.hpp"
#include "cuda/attend_raw.cuh"
#include "cuda/barrier.cuh"

namespace kvarn::cuda {

__device__ inline int pieces_of(int tokens) { return (tokens + kRawTokens - 1) / kRawTokens; }

// Rows of a block lie in one or two tiles; how many raw tokens of tile own_tile + which they see at most.
template <class S>
__device__ inline int own_tokens(const BlockPlan& b, int group, int which) {
  if (which + 1 < b.own_tiles) return S::page_tokens;
  return (b.start + (b.first_column + b.columns - 1) / group) % S::page_tokens + 1;
}
__device__ inline int packed_units(const BlockPlan& b) {
  return b.end_tile > b.first_tile ? (b.end_tile + kPieceTiles - 1) / kPieceTiles - b.first_tile / kPieceTiles : 0;
}

// A position in a CTA's share of the order (block, head, unit). Of the block only its size is kept, for registers; what
// else is needed of it is read again, from the first-level cache.
struct Place {
  int32_t block, head, unit, units;
  int32_t number, segment;  // of the CTA's units and segments (block, head), from 0

  __device__ void begin(const AttendParameters& p, const Cut& cut) {
    block = cut.block, head = cut.head, unit = cut.unit;
    number = segment = 0;
    units = p.plan.blocks[block].units;
  }
  // `total` units are in the share; beyond them nothing may be read.
  __device__ bool advance(const AttendParameters& p, int32_t by, int32_t total) {
    number += by;
    if (number >= total) return false;
    unit += by;
    while (unit >= units) {
      unit -= units;
      ++segment;
      if (++head == p.heads) {
        head = 0;
        units = p.plan.blocks[++block].units;
      }
    }
    return true;
  }
};

// A place with its steps.
template <class S>
struct Walk {
  Place at;
  bool more;
  int32_t step, steps;
  int32_t tile;          // packed: of step 0; raw: the own tile
  int32_t first, valid;  // raw: token of step 0, and how many there are in the tile; packed: first is -1
  int32_t raw_slot;      // raw: of the workspace, or -1 for the pages
  bool edge;             // is there a token here that some row of the block does not see?
  int32_t request;
  int32_t page;  // of the current step: of the tile, or of the lane's token

  __device__ bool raw() const { return first >= 0; }

  __device__ void decode(const AttendParameters& p) {
    const BlockPlan& b = p.plan.blocks[at.block];
    step = 0;
    request = b.request;
    const int packed = packed_units(b);
    if (at.unit < packed) {
      const int piece = b.first_tile / kPieceTiles + at.unit;
      tile = max(b.first_tile, piece * kPieceTiles);
      steps = min(b.end_tile, (piece + 1) * kPieceTiles) - tile;
      first = -1;
      const int last = b.start + (b.first_column + b.columns - 1) / p.group;
      edge = tile + steps > b.own_tile || (p.window > 0 && tile * S::page_tokens <= last - p.window);
    } else {
      int x = at.unit - packed;
      const int of_first = pieces_of(own_tokens<S>(b, p.group, 0)), which = x >= of_first ? 1 : 0;
      if (which) x -= of_first;
      tile = b.own_tile + which;
      raw_slot = which ? b.raw[1] : b.raw[0];
      first = x * kRawTokens;
      edge = true;
      valid = own_tokens<S>(b, p.group, which);
      steps = min(kRawTokens / kRawStep, (valid - first + kRawStep - 1) / kRawStep);
    }
  }

  __device__ void begin(const AttendParameters& p, const Cut& cut, int warp, int lane) {
    at.begin(p, cut);
    more = warp == 0 ? cut.units > 0 : at.advance(p, warp, cut.units);
    if (more) decode(p), look_up(p, lane);
  }
  __device__ void advance(const AttendParameters& p, int by, int total, int lane) {
    if (++step == steps) {
      more = at.advance(p, by, total);
      if (!more) return;
      decode(p);
    }
    look_up(p, lane);
  }

  // Beyond the last token of the tile the last one is read again: what p = 0 multiplies must be finite.
  __device__ int32_t raw_token(int lane) const { return min(first + step * kRawStep + (lane & 15), valid - 1); }

  // The page that the current step reads, ahead of time.
  __device__ void look_up(const AttendParameters& p, int lane) {
    int entry = tile + step;
    if (raw()) {
      if (raw_slot >= 0) return;
      const int token = raw_token(lane);
      entry = token < S::raw_tokens_per_page ? tile + S::pages_ahead : tile + token / S::raw_tokens_per_page;
    }
    const int32_t found = p.block_table[request * p.table_stride + entry];
    page = min(max(found, 0), static_cast<int32_t>(p.page_count - 1));
  }
  __device__ const uint8_t* region(const AttendParameters& p) const {
    return p.pages + page * p.page_stride + int64_t{at.head} * S::record_bytes;
  }

  static constexpr int kKeyBytes = static_cast<int>(S::layout.v_codes);
  static constexpr int kValueBytes = S::record_bytes - kKeyBytes;
  static constexpr int kRawBytes = kRawStep * kRawRowBytes<S>;
  static constexpr int kValueOffset = kKeyBytes > kRawBytes ? kKeyBytes : (kRawBytes + 127) / 128 * 128;
  static constexpr int kSlotBytes =
      (kValueOffset + (kValueBytes > kRawBytes ? kValueBytes : kRawBytes) + 127) / 128 * 128;

  // Copies the step's K part, or V part, into a slot.
  template <bool kKeys>
  __device__ void load(const AttendParameters& p, uint8_t* slot, Barrier* barrier, int lane) const {
    uint8_t* to = slot + (kKeys ? 0 : kValueOffset);
    if (!raw()) {
      constexpr int kBytes = kKeys ? kKeyBytes : kValueBytes;
      expect_copies(barrier, kBytes, lane);
      copy_stretch(to, region(p) + (kKeys ? 0 : kKeyBytes), kBytes, barrier, lane);
    } else {
      constexpr int kRow = 2 * S::head_dim;
      expect_copies(barrier, kRawStep * kRow, lane);
      if (lane < kRawStep) {
        const int token = raw_token(lane);
        const uint8_t* from;
        if (raw_slot >= 0) {
          const int64_t matrix = (int64_t{raw_slot} * p.heads + at.head) * 2 + (kKeys ? 0 : 1);
          from = reinterpret_cast<const uint8_t*>(p.plan.raw) + (matrix * S::page_tokens + token) * kRow;
        } else {
          const int slot_of = token % S::raw_tokens_per_page;
          from = region(p) + (slot_of + (kKeys ? 0 : S::raw_tokens_per_page)) * kRow;
        }
        copy_row(to + lane * kRawRowBytes<S>, from, kRow, barrier);
      }
    }
    finish_copies(barrier);
  }
};

}  // namespace kvarn::cuda
