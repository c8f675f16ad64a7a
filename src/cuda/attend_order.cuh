// SPDX-License-Identifier: Apache-2.0
// The order of attention's work, and the order of its additions.
//
// A segment is a block's history for one KV head: a step for every packed tile, then one for every 16 or 32 raw tokens
// of the own tile, or of two. The boundary before each step has a rank; a lower rank is added across first. Four tiles,
// at absolute numbers, are chained one after the other (ranks -3, -2, -1); pieces of four lie under a binary tree over
// absolute numbers (the rank of piece j is how often 2 divides j); then come the own tiles. So a stretch of the history
// leaves few partial results wherever it is cut, and the bits of a sum depend on nothing but the positions in the
// segment.
#pragma once

#include "cuda/plan.hpp"

namespace kvarn::cuda {

inline constexpr int kRankOwn = 40, kRankBegins = 64, kRankEnds = 100;  // an own tile, the segment, and what follows it

__device__ inline int packed_steps(const BlockPlan& b) { return max(b.end_tile - b.first_tile, 0); }

// The position of a block's last row.
__device__ inline int last_position(const BlockPlan& b, int group) {
  return b.start +
         static_cast<int>(static_cast<unsigned>(b.first_column + b.columns - 1) / static_cast<unsigned>(group));
}
// Rows of a block lie in one or two tiles; how many raw tokens of tile own_tile + which they see at most.
__device__ inline int own_tokens(const BlockPlan& b, int page_tokens, int last, int which) {
  return which + 1 < b.own_tiles ? page_tokens : last % page_tokens + 1;
}

// Before the step of that number in its row: packed tiles, or an own tile.
__device__ inline int piece_rank(int number) {
  const int inside = number & (kPieceTiles - 1);
  return inside != 0 ? inside - kPieceTiles : __ffs(number / kPieceTiles) - 1;
}
// Of the boundary before a step; step b.steps is the end.
__device__ inline int rank_of(const BlockPlan& b, int step) {
  if (step == 0) return kRankBegins;
  if (step == b.steps) return kRankEnds;
  const int packed = packed_steps(b);
  if (step < packed) return piece_rank(b.first_tile + step);
  const int raw = step - packed, inside = raw >= b.own_steps ? raw - b.own_steps : raw;
  if (inside == 0) return kRankOwn + (raw >= b.own_steps ? 1 : 0);
  return piece_rank(inside);
}

// The nearest boundary behind a step, or before it, of a higher rank than the one before the step: what bits of a
// number tell, as in a Fenwick tree.
struct Stretch {
  int begin, end, number;  // of steps that are numbered in one row: packed tiles, or an own tile; the step's number
};
__device__ inline Stretch stretch_of(const BlockPlan& b, int step) {
  const int packed = packed_steps(b), second = packed + b.own_steps;
  if (step < packed) return {0, packed, b.first_tile + step};
  return step < second ? Stretch{packed, second, step - packed} : Stretch{second, b.steps, step - second};
}
__device__ inline int higher_behind(const BlockPlan& b, int step) {
  const Stretch s = stretch_of(b, step);
  if (step == 0) return b.steps;
  if (s.number == 0) return s.end;
  return min(step + (s.number % kPieceTiles != 0 ? 1 : s.number & -s.number), s.end);
}
__device__ inline int higher_before(const BlockPlan& b, int step) {
  const Stretch s = stretch_of(b, step);
  if (step == b.steps || s.number == 0) return 0;
  return max(step - (s.number % kPieceTiles != 0 ? s.number % kPieceTiles : s.number & -s.number), s.begin);
}

// How many partial results steps begin .. end-1 of a segment are left with, however they are computed: the boundaries
// between those are the ones that are higher than all others on one side.
__device__ inline int remains(const BlockPlan& b, int begin, int end) {
  int count = 1, last = begin;
#pragma unroll 1
  for (int x = begin; (x = higher_behind(b, x)) < end; last = x) ++count;
#pragma unroll 1
  for (int x = end; (x = higher_before(b, x)) > last;) ++count;
  return count;
}

}  // namespace kvarn::cuda
