// SPDX-License-Identifier: Apache-2.0
// What a CTA's lists are left with when they end: segments that reach over the end of a list, and who shares them.
#pragma once

#include "cuda/attend_room.cuh"

namespace kvarn::cuda {

// How many partial results a CTA leaves of a segment.
__device__ inline int parts_of(const AttendParameters& p, const Left& left, const BlockPlan& b, int cta) {
  const Share share = share_of(p, cta * p.in.teams, p.in.teams);
  const auto step_of = [&](const Cut& c, int other) {
    return c.block == left.block && c.head == left.head ? c.step : other;
  };
  return share.steps() == 0 ? 0 : remains(b, step_of(share.begin, 0), step_of(share.end, b.steps));
}

// Fills room.left. By one warp, before the end.
__device__ inline void find_left(const AttendParameters& p, Room& room, int lane) {
  const int cta = static_cast<int>(blockIdx.x), ctas = static_cast<int>(gridDim.x), teams = p.in.teams;
  const Cut cut = p.plan.cuts[cta * teams + min(lane, teams)];
  const Cut begin = p.plan.cuts[cta * teams], end = p.plan.cuts[cta * teams + teams];
  const auto of = [](const Cut& c, int block, int head) { return c.block == block && c.head == head; };
  // A segment that is left reaches over the beginning of a list, or of the next CTA.
  const bool over = lane <= teams && cut.step > 0 && begin.number < end.number;
  const int block_before = __shfl_up_sync(~0u, cut.block, 1), head_before = __shfl_up_sync(~0u, cut.head, 1),
            step_before = __shfl_up_sync(~0u, cut.step, 1);
  const bool same = over && lane > 0 && step_before > 0 && of(cut, block_before, head_before);
  const unsigned sames = __ballot_sync(~0u, same), firsts = __ballot_sync(~0u, over && !same);
  if (lane == 0) room.left_count = __popc(firsts);
  if (over && !same) {
    Left& left = room.left[__popc(firsts & ((1u << lane) - 1))];
    const BlockPlan& b = p.plan.blocks[cut.block];
    const int last = lane + __ffs(static_cast<int>(~(sames >> lane >> 1))) - 1;
    const bool head = lane == 0, tail = last == teams;
    left = {cut.block,
            cut.head,
            max(lane - 1, 0),
            min(last, teams - 1),
            !head,
            !tail,
            Target::of(b),
            0,
            b.steps,
            cta,
            cta,
            head ? 0 : 1,
            false,
            nullptr,
            {}};
    if (head || tail) left.steps = (tail ? end.step : b.steps) - (head ? begin.step : 0);
  }
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < __popc(firsts); ++i) {  // 32 CTAs at a time
    Left& left = room.left[i];
    if (left.steps == 0) continue;
    int first = cta, last = cta;
    if (left.end == 0)
#pragma unroll 1
      for (unsigned found = 0; found == 0;) {
        const int candidate = first - 1 - lane;
        bool before = candidate <= 0;
        if (!before) {
          const Cut c = p.plan.cuts[candidate * teams];
          before = of(c, left.block, left.head) ? c.step == 0
                                                : c.block < left.block || (c.block == left.block && c.head < left.head);
        }
        found = __ballot_sync(~0u, before);
        first = max(found != 0 ? first - __ffs(static_cast<int>(found)) : first - 32, 0);
      }
#pragma unroll 1
    for (unsigned beyond = 0; beyond == 0;) {
      const int candidate = last + 1 + lane;
      bool inside = candidate < ctas;
      if (inside) {
        const Cut c = p.plan.cuts[candidate * teams];
        inside = of(c, left.block, left.head) && c.step > 0;
      }
      beyond = __ballot_sync(~0u, !inside);
      last += beyond != 0 ? __ffs(static_cast<int>(beyond)) - 1 : 32;
    }
    if (lane == 0) left.first_cta = first, left.last_cta = last;
    left.parts[lane] =
        first + lane > last ? 0 : static_cast<uint8_t>(parts_of(p, left, p.plan.blocks[left.block], first + lane));
    __syncwarp();
  }
}

}  // namespace kvarn::cuda
