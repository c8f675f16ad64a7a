// SPDX-License-Identifier: Apache-2.0
// A CTA's share of the work, and the order in which its teams take it.
//
// A unit is a piece of history: four steps, each a packed tile or 16 raw tokens; some may be missing. Step by step goes to
// the teams in turn. A run is what a team takes before it delivers: a whole unit, so that the teams work on as many units
// side by side; but of the last units, where there are too few for all teams, every step is a run.
#pragma once

#include "cuda/attend.hpp"

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

// A unit of a block's history.
struct Unit {
  int32_t tile, steps;   // packed: the first tile; raw: the own tile
  int32_t first, valid;  // raw: the first token, and how many there are in the tile; packed: first is -1
  int32_t which;         // raw: of the own tiles

  template <class S>
  __device__ static Unit of(const BlockPlan& b, int group, int unit) {
    const int packed = packed_units(b);
    if (unit < packed) {
      const int piece = b.first_tile / kPieceTiles + unit, tile = max(b.first_tile, piece * kPieceTiles);
      return {tile, min(b.end_tile, (piece + 1) * kPieceTiles) - tile, -1, 0, 0};
    }
    const int index = unit - packed, of_first = pieces_of(own_tokens<S>(b, group, 0)), which = index >= of_first ? 1 : 0;
    const int first = (which ? index - of_first : index) * kRawTokens, valid = own_tokens<S>(b, group, which);
    return {b.own_tile + which, min(kPieceTiles, (valid - first + kRawStep - 1) / kRawStep), first, valid, which};
  }
};

// Where the order of a block closes: after a unit nothing, 1 its group, 2 its chapter too.
struct Closing {
  int32_t first_piece, packed, own, units;

  template <class S>
  __device__ static Closing of(const BlockPlan& b, int group) {
    const int packed = packed_units(b);
    return {b.first_tile / kPieceTiles, packed, packed + pieces_of(own_tokens<S>(b, group, 0)), b.units};
  }
  __device__ int after(int unit) const {
    const int next = unit + 1, piece = first_piece + next;
    if (next == packed || next == own || next == units) return 2;
    if (next > packed || piece % kFoldPieces != 0) return 0;
    return piece % (kFoldPieces * kFoldPieces) == 0 ? 2 : 1;
  }
};

// A position in a CTA's share of the order (block, head, unit).
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
#pragma unroll 1
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

// Items: four steps a unit, item i for team i % teams.
struct Schedule {
  int32_t teams, units, whole;  // whole: units that are runs, rounds of one for every team

  __device__ Schedule(const AttendParameters& p, const Cut& cut)
      : teams(p.teams), units(cut.units), whole(units / p.teams * p.teams) {}
  __device__ int items() const { return kPieceTiles * units; }
  __device__ bool splits(int unit) const { return unit >= whole; }
  // Runs are numbered in the order of items; a team's runs are a round of teams apart, as its items are.
  __device__ int run_of(int item) const {
    return item < kPieceTiles * whole ? item / (kPieceTiles * teams) * teams + item % teams
                                      : whole + item - kPieceTiles * whole;
  }
  // No item from here on is of an earlier unit.
  __device__ int least_unit(int item) const {
    return item < kPieceTiles * whole ? item / (kPieceTiles * teams) * teams : item / kPieceTiles;
  }
  __device__ void locate(int item, int& unit, int& step) const {
    if (item < kPieceTiles * whole) {
      unit = item / (kPieceTiles * teams) * teams + item % teams;
      step = item / teams % kPieceTiles;
    } else {
      unit = item / kPieceTiles;
      step = item % kPieceTiles;
    }
  }
};

}  // namespace kvarn::cuda
