// SPDX-License-Identifier: Apache-2.0
// Who computes what: attention's work, a row of steps, cut into shares for CTAs and for the lists of their teams. Any
// cut is right (attend_order.cuh); these are about the time it takes.
#pragma once

#include "cuda/attend_order.cuh"
#include "cuda/plan_inputs.cuh"

namespace kvarn::cuda {

struct Costs {
  int64_t weight;
  int32_t steps;
  __device__ friend Costs operator+(const Costs& a, const Costs& b) { return {a.weight + b.weight, a.steps + b.steps}; }
};

__device__ inline int32_t weight_before(const BlockPlan& b, int32_t step) {
  const int32_t packed = packed_steps(b);
  return kPackedWeight * min(step, packed) + kRawWeight * max(step - packed, 0) + (step > 0 ? kSegmentWeight : 0);
}
__device__ inline int32_t weight_of(const BlockPlan& b) { return weight_before(b, b.steps); }

// A share is cut where it is even, or up to `reach` steps beside it where the rank is higher: fewer partial results.
__device__ inline Cut cut_at(const PlanInputs& in, const BlockPlan* blocks, int32_t index, int32_t head, int32_t step,
                             int32_t reach) {
  const BlockPlan& b = blocks[index];
  int32_t best = step;
  for (int32_t d = 1; d <= reach; ++d)
    for (int32_t other : {step - d, step + d})
      if (other >= 0 && other <= b.steps && rank_of(b, other) > rank_of(b, best)) best = other;
  Cut cut{index, head, best, b.steps_before + head * b.steps + best};
  if (cut.step == b.steps) cut.step = 0, ++cut.head;
  if (cut.head == in.layout.kv_heads) cut.head = 0, ++cut.block;
  return cut;
}

// The step of a segment's `weight`.
__device__ inline int32_t step_at(const BlockPlan& b, int32_t weight) {
  weight = max(weight - kSegmentWeight, 0);
  const int32_t packed = packed_steps(b), raw = weight - kPackedWeight * packed;
  return raw <= 0 ? (weight + kPackedWeight / 2) / kPackedWeight : packed + (raw + kRawWeight / 2) / kRawWeight;
}
// Where a share of `weight` ends, in blocks first .. end-1.
__device__ inline Cut cut_at_weight(const PlanInputs& in, const BlockPlan* blocks, int32_t first, int32_t end,
                                    int64_t weight, int32_t reach) {
  const int32_t index =
      first + last_at_most(end - first, weight, [&](int32_t i) { return blocks[first + i].weight_before; });
  const auto inside = static_cast<int32_t>(weight - blocks[index].weight_before);
  const int32_t size = weight_of(blocks[index]);
  return cut_at(in, blocks, index, inside / size, step_at(blocks[index], inside % size), reach);
}

// Requests whose histories, of least to most packed tiles, differ by a twelfth at most: shares of as many segments are
// better for them than shares of one weight, which end in the middle of segments.
__device__ inline bool nearly_even(int32_t least, int32_t most) { return 12 * (most - least) <= least; }

// How many CTAs get a share: as many as give every list a step, of up to 8 lists. If all segments are alike, half the
// lists, for a CTA that has an own tile has its raw steps besides; and whole CTAs for a segment or whole segments for a
// CTA, where that costs no more than a twentieth: then little has to be merged, which matters more.
__device__ inline int32_t shares_of(const PlanInputs& in, int64_t weight, int32_t segments, bool even) {
  const int32_t most_lists = min(in.teams, 8), lists = even ? (most_lists + 1) / 2 : most_lists;
  const auto most = static_cast<int32_t>(min(int64_t{in.ctas}, (weight + lists - 1) / lists));
  if (!even) return most;
  const int32_t each = (segments + most - 1) / most;  // segments of a CTA
  const int32_t rounder = segments > most ? (segments + each - 1) / each
                                          : min(in.ctas / segments, (most + segments / 2) / segments) * segments;
  return 20 * rounder >= 19 * most ? rounder : most;
}

// Few segments of requests that are nearly as long: a list has one packed tile, and the own tile a CTA of its own,
// since its steps take longest to come. How many CTAs a segment has then; 0 where there are not enough of them.
__device__ inline int32_t ctas_of_short(const PlanInputs& in, int32_t packed, int32_t segments) {
  const int32_t lists = min(in.teams, 8), each = (packed + lists - 1) / lists + 1;
  return int64_t{each} * segments <= in.ctas ? each : 0;
}
__device__ inline Cut cut_of_short(const PlanInputs& in, const BlockPlan* blocks, int32_t each, int32_t segment,
                                   int32_t part) {
  const int32_t index = segment / in.layout.kv_heads, packed = packed_steps(blocks[index]);
  const bool own = part + 1 == each;
  return cut_at(in, blocks, index, segment % in.layout.kv_heads, own ? packed : packed * part / (each - 1),
                own || part == 0 ? 0 : 1);
}

// CTAs have shares of one weight; that of raw steps, and differences between histories, do not count where these are
// nearly as long (`even`).
__device__ inline Cut cut_of_cta(const PlanInputs& in, const BlockPlan* blocks, int32_t count, const Costs& all,
                                 bool even, int32_t cta) {
  const Cut end{count, 0, 0, all.steps};
  if (count == 0) return end;
  const int32_t segments = count * in.layout.kv_heads, packed = packed_steps(blocks[0]);
  const bool alike = even && packed > 0;
  if (const int32_t each = alike ? ctas_of_short(in, packed, segments) : 0; each > 0)
    return cta < each * segments ? cut_of_short(in, blocks, each, cta / each, cta % each) : end;
  const int64_t weight = alike ? int64_t{segments} * packed : all.weight, unit = alike ? 1 : kPackedWeight;
  const int32_t shares = shares_of(in, weight / unit, segments, alike);
  if (cta >= shares) return end;
  const int64_t at = weight * cta / shares, share = weight / unit / shares;
  const int32_t reach = cta == 0 ? 0 : static_cast<int32_t>(min(max(share / 16, int64_t{1}), int64_t{2 * kPieceTiles}));
  if (!alike) return cut_at_weight(in, blocks, 0, count, at, reach);
  const auto segment = static_cast<int32_t>(at / packed);
  const int32_t index = segment / in.layout.kv_heads;
  return cut_at(in, blocks, index, segment % in.layout.kv_heads,
                min(static_cast<int32_t>(at % packed), blocks[index].steps), reach);
}
// In a CTA, lists have shares of one weight; or a step each, where that is enough.
__device__ inline Cut cut_of_list(const PlanInputs& in, const BlockPlan* blocks, int32_t count, const Cut& begin,
                                  const Cut& end, const Costs& all, int32_t list) {
  const auto weight_at = [&](const Cut& cut) {
    if (cut.block == count) return all.weight;
    const BlockPlan& b = blocks[cut.block];
    return b.weight_before + cut.head * weight_of(b) + weight_before(b, cut.step);
  };
  const int32_t steps = end.number - begin.number;
  if (list >= steps) return end;
  if (steps <= in.teams) {
    const int32_t number = begin.number + list;
    const int32_t index = begin.block + last_at_most(min(end.block + 1, count) - begin.block, number,
                                                     [&](int32_t i) { return blocks[begin.block + i].steps_before; });
    const int32_t inside = number - blocks[index].steps_before, size = blocks[index].steps;
    return cut_at(in, blocks, index, inside / size, inside % size, 0);
  }
  const int64_t first = weight_at(begin), weight = weight_at(end) - first;
  const Cut cut = cut_at_weight(in, blocks, begin.block, min(end.block + 1, count), first + weight * list / in.teams,
                                static_cast<int32_t>(weight / kPackedWeight / in.teams / 16));
  return cut.number < end.number ? cut : end;
}

}  // namespace kvarn::cuda
