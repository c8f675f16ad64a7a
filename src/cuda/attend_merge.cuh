// SPDX-License-Identifier: Apache-2.0
// Segments that several CTAs share: each leaves its parts in global memory, and the last CTA to arrive folds the parts of
// all, in order, with all its warps.
#pragma once

#include "cuda/attend_walk.cuh"

namespace kvarn::cuda {

// How many parts a CTA left of the segment it did not begin, and of the one it only began.
struct PartCounts {
  int32_t head, tail;
};
struct PartRecord {
  PartCounts counts;
  uint8_t code[4];  // and further: of each part, the level it is folded into | the level up to which that closes << 2
};

// A CTA's stretch of the workspace: PartRecord in the first place, then the parts.
template <class S, int kTiles>
struct Parts {
  using Stored = StoredState<S::head_dim, kTiles>;
  static constexpr int64_t kBytes = part_bytes(S::head_dim);
  static_assert(sizeof(Stored) <= kBytes);

  uint8_t* base;
  __device__ Parts(const AttendParameters& p, int cta)
      : base(reinterpret_cast<uint8_t*>(p.plan.parts) + cta * (p.max_parts + 1) * kBytes) {}
  __device__ PartRecord& record() const { return *reinterpret_cast<PartRecord*>(base); }
  __device__ Stored& part(int index) const { return *reinterpret_cast<Stored*>(base + (index + 1) * kBytes); }
};

// Segments that this CTA has to merge when its share is done: at most the first and the last of it.
struct MergeList {
  struct Segment {
    int32_t block, head, first, last;  // and the CTAs that left parts
  } segments[2];
  int32_t count;
};

__device__ inline bool begins_at_or_before(const Cut& cut, const Place& at) {
  if (cut.block != at.block) return cut.block < at.block;
  return cut.head != at.head ? cut.head < at.head : cut.unit == 0;
}

// Makes this CTA's parts of a segment known. The last CTA to come takes the merge on itself. By one warp.
template <class S, int kTiles>
__device__ void share(const AttendParameters& p, const Place& at, PartCounts counts, int first_unit, int units,
                      MergeList& merges, int lane) {
  const int cta = static_cast<int>(blockIdx.x);
  int first = cta, last = cta;
  if (first_unit > 0)
    while (!begins_at_or_before(p.plan.cuts[first], at)) --first;
  if (lane == 0) Parts<S, kTiles>(p, cta).record().counts = counts;
  __threadfence();
  __syncwarp();
  uint32_t arrived = 0;
  if (lane == 0) arrived = atomicAdd(&p.plan.counters[first], static_cast<uint32_t>(units));
  arrived = __shfl_sync(~0u, arrived, 0) + static_cast<uint32_t>(units);
  if (arrived != static_cast<uint32_t>(at.units)) return;
  __threadfence();
  while (last + 1 < static_cast<int>(gridDim.x)) {
    const Cut c = p.plan.cuts[last + 1];
    if (c.block != at.block || c.head != at.head || c.unit == 0) break;
    ++last;
  }
  if (lane == 0) {
    merges.segments[merges.count++] = {at.block, at.head, first, last};
    p.plan.counters[first] = 0;
  }
  __syncwarp();
}

struct MergeEntry {
  const void* part;
  int32_t code;
};

// The parts of a segment in order, by one warp; returns how many.
template <class S, int kTiles>
__device__ int list_parts(const AttendParameters& p, const MergeList::Segment& segment, MergeEntry* entries, int lane) {
  int total = 0;
  for (int base = segment.first; base <= segment.last; base += 32) {
    const int cta = base + lane;
    int begin = 0, count = 0;
    const Parts<S, kTiles> parts(p, min(cta, segment.last));
    if (cta <= segment.last && p.plan.cuts[cta].units > 0) {
      const int head = __ldcg(&parts.record().counts.head), tail = __ldcg(&parts.record().counts.tail);
      begin = cta == segment.first ? head : 0;
      count = cta == segment.first ? tail : head;
    }
    int before = count;  // inclusive scan
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int other = __shfl_up_sync(~0u, before, o);
      if (lane >= o) before += other;
    }
    for (int i = 0; i < count; ++i)
      entries[total + before - count + i] = {&parts.part(begin + i), __ldcg(parts.record().code + begin + i)};
    total += __shfl_sync(~0u, before, 31);
  }
  __syncwarp();
  return total;
}

// One pair of every lane's values, through all parts; `slice` of kTiles * D / 16.
template <class S, int kTiles>
__device__ void merge_slice(const MergeEntry* entries, int count, int slice, StoredState<S::head_dim, kTiles>& result,
                            int lane) {
  using Stored = StoredState<S::head_dim, kTiles>;
  constexpr int kPerTile = S::head_dim / 16, kBatch = 8;
  const int nt = slice / kPerTile, column = 4 * nt + (lane & 3);
  struct Level {
    float m = kEmpty, l = 0;
    float2 x = {0, 0};
    __device__ void fold(float later, float sum, float2 y) {
      const FoldFactors f = fold_factors(m, later);
      m = f.m;
      l = fold_value(l, sum, f);
      x = {fold_value(x.x, y.x, f), fold_value(x.y, y.y, f)};
    }
  } group, chapter, whole;
  const auto pair = [&](Stored& s) {
    return reinterpret_cast<float2*>(&s.out[nt][slice % kPerTile / 2][lane]) + slice % 2;
  };
  for (int base = 0; base < count; base += kBatch) {
    float m[kBatch], l[kBatch];
    float2 x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      Stored& part = *static_cast<Stored*>(const_cast<void*>(entries[min(base + i, count - 1)].part));
      m[i] = __ldcg(&part.m[column]);
      l[i] = __ldcg(&part.l[column]);
      x[i] = __ldcg(pair(part));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + i >= count) break;
      const int code = entries[base + i].code, level = code & 3, close = code >> 2;
      if (level == 0) group.fold(m[i], l[i], x[i]);
      if (level == 1) chapter.fold(m[i], l[i], x[i]);
      if (level == 2) whole.fold(m[i], l[i], x[i]);
      if (level == 0 && close >= 1) chapter.fold(group.m, group.l, group.x), group = Level{};
      if (level <= 1 && close == 2) whole.fold(chapter.m, chapter.l, chapter.x), chapter = Level{};
    }
  }
  *pair(result) = whole.x;
  if (slice % kPerTile == 0 && lane < 4) result.m[column] = whole.m, result.l[column] = whole.l;
}

}  // namespace kvarn::cuda
