// SPDX-License-Identifier: Apache-2.0
// Segments that several CTAs share: each leaves its parts in global memory, and the last CTA to arrive folds the parts of
// all, in order, with all its warps.
#pragma once

#include "cuda/attend_room.cuh"
#include "cuda/attend_share.cuh"

namespace kvarn::cuda {

// How many parts a CTA left of the segment it did not begin, and of the one it only began.
struct alignas(8) PartCounts {
  int32_t head, tail;
};

// A CTA's stretch of the workspace: PartCounts in the first place, then the parts: a state of each warp of a team, and
// behind them the level into which it is folded | the level up to which that closes << 2.
template <class S>
struct Parts {
  using Stored = StoredState<S::head_dim>;
  static constexpr int64_t kBytes = part_bytes(S::head_dim);
  static_assert(kMaxTeamWarps * sizeof(Stored) + 16 <= kBytes);

  uint8_t* base;
  int team_warps;
  __device__ Parts(const AttendParameters& p, int cta)
      : base(reinterpret_cast<uint8_t*>(p.plan.parts) + cta * (p.max_parts + 1) * kBytes), team_warps(p.team_warps) {}
  __device__ PartCounts& counts() const { return *reinterpret_cast<PartCounts*>(base); }
  __device__ Stored* part(int index) const { return reinterpret_cast<Stored*>(base + (index + 1) * kBytes); }
  __device__ int32_t& code(int index) const { return *reinterpret_cast<int32_t*>(part(index) + team_warps); }
};

__device__ inline bool begins_at_or_before(const Cut& cut, const Place& at) {
  if (cut.block != at.block) return cut.block < at.block;
  return cut.head != at.head ? cut.head < at.head : cut.unit == 0;
}

// Makes this CTA's parts of a segment known. The last CTA to come takes the merge on itself. By one warp, which looks at 32
// cuts at a time: one after the other, 16 of them took 10 us.
template <class S>
__device__ void share(const AttendParameters& p, const Place& at, PartCounts counts, int first_unit, int units,
                      MergeList& merges, int lane) {
  const int cta = static_cast<int>(blockIdx.x), ctas = static_cast<int>(gridDim.x);
  int first = cta;
  if (first_unit > 0)
#pragma unroll 1
    for (unsigned found = 0; found == 0;) {
      const int candidate = first - 1 - lane;
      found = __ballot_sync(~0u, candidate <= 0 || begins_at_or_before(p.plan.cuts[candidate], at));
      first = max(found != 0 ? first - __ffs(static_cast<int>(found)) : first - 32, 0);
    }
  if (lane == 0) Parts<S>(p, cta).counts() = counts;
  __threadfence();
  __syncwarp();
  uint32_t arrived = 0;
  if (lane == 0) arrived = atomicAdd(&p.plan.counters[first], static_cast<uint32_t>(units));
  arrived = __shfl_sync(~0u, arrived, 0) + static_cast<uint32_t>(units);
  if (arrived != static_cast<uint32_t>(at.units)) return;
  __threadfence();
  int last = cta;
#pragma unroll 1
  for (unsigned beyond = 0; beyond == 0;) {
    const int candidate = last + 1 + lane;
    bool inside = candidate < ctas;
    if (inside) {
      const Cut c = p.plan.cuts[candidate];
      inside = c.block == at.block && c.head == at.head && c.unit > 0;
    }
    beyond = __ballot_sync(~0u, !inside);
    last += beyond != 0 ? __ffs(static_cast<int>(beyond)) - 1 : 32;
  }
  if (lane == 0) {
    merges.segments[merges.count++] = {at.block, at.head, first, last};
    p.plan.counters[first] = 0;
  }
  __syncwarp();
}

// The parts that CTAs from `cta` on left of a segment, in order, by one warp: of as many CTAs as there is room for.
template <class S>
__device__ void list_parts(const AttendParameters& p, const MergeList::Segment& segment, int cta, const uint8_t** list,
                           int most, Room<S>& room, int lane) {
  const int mine = cta + lane;
  int begin = 0, count = 0;
  const Parts<S> parts(p, min(mine, segment.last));
  if (mine <= segment.last && p.plan.cuts[mine].units > 0) {
    const int head = __ldcg(&parts.counts().head), tail = __ldcg(&parts.counts().tail);
    begin = mine == segment.first ? head : 0;
    count = mine == segment.first ? tail : head;
  }
  int until = count;  // inclusive scan
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int other = __shfl_up_sync(~0u, until, o);
    if (lane >= o) until += other;
  }
  const bool fits = until <= most;  // of the first CTA always: see configure()
  if (fits)
#pragma unroll 1
    for (int i = 0; i < count; ++i) list[until - count + i] = reinterpret_cast<const uint8_t*>(parts.part(begin + i));
  const int ctas = __popc(__ballot_sync(~0u, fits));
  if (lane == ctas - 1) room.merge_parts = until, room.merge_next = mine + 1;
}

// One pair of every lane's values, through all parts in order.
template <class S>
class PairMerge {
 public:
  using Stored = StoredState<S::head_dim>;
  static constexpr int kSlices = S::head_dim / 16;

  __device__ PairMerge(int slice, int lane) : slice_(slice), lane_(lane) {}

  __device__ void take(const Stored* states, const int32_t* codes, int count) {
    constexpr int kBatch = 4;  // read together
#pragma unroll 1
    for (int base = 0; base < count; base += kBatch) {
      Level part[kBatch];
      int code[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int index = min(base + i, count - 1);
        const Stored& state = states[index];
        part[i] = {state.m[lane_ & 3], state.l[lane_ & 3], *pair(state)};
        code[i] = codes[index];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (base + i >= count) break;
        const int level = code[i] & 3, close = code[i] >> 2;
        if (level == 0) group_.fold(part[i]);
        if (level == 1) chapter_.fold(part[i]);
        if (level == 2) whole_.fold(part[i]);
        if (level == 0 && close >= 1) chapter_.fold(group_), group_ = Level{};
        if (level <= 1 && close == 2) whole_.fold(chapter_), chapter_ = Level{};
      }
    }
  }
  __device__ void store(Stored& result) const {
    const_cast<float2&>(*pair(result)) = whole_.x;
    if (slice_ == 0 && lane_ < kWarpColumns) result.m[lane_] = whole_.m, result.l[lane_] = whole_.l;
  }

 private:
  struct Level {
    float m = kEmpty, l = 0;
    float2 x = {0, 0};
    __device__ void fold(const Level& later) {
      const FoldFactors f = fold_factors(m, later.m);
      m = f.m;
      l = fold_value(l, later.l, f);
      x = {fold_value(x.x, later.x.x, f), fold_value(x.y, later.x.y, f)};
    }
  };
  __device__ const float2* pair(const Stored& s) const {
    return reinterpret_cast<const float2*>(&s.out[slice_ / 2][lane_]) + slice_ % 2;
  }
  int slice_, lane_;
  Level group_, chapter_, whole_;
};

// What merging needs for a part: its state of one warp, its code and where it comes from.
template <class S>
inline constexpr int kMergeBytes = static_cast<int>(sizeof(StoredState<S::head_dim>) + sizeof(int32_t) + sizeof(void*));

// The parts of one warp's columns, by the whole CTA, where results and slots were; the result lies in the segment's level.
template <class S>
__device__ void merge(const AttendParameters& p, const MergeList::Segment& segment, int columns_of, Room<S>& room,
                      int warp, int lane) {
  using Stored = StoredState<S::head_dim>;
  constexpr int kWords = static_cast<int>(sizeof(Stored) / 16);
  const int most = min(merge_bytes<S>(p) / kMergeBytes<S>, 32 * kWarps);
  Stored* states = &room.result(p, 0, 0);
  const uint8_t** list = reinterpret_cast<const uint8_t**>(states + most);
  int32_t* codes = reinterpret_cast<int32_t*>(list + most);
#pragma unroll 1
  for (int base = 0; base < PairMerge<S>::kSlices; base += kWarps) {
    PairMerge<S> pairs(base + warp, lane);
    const bool mine = base + warp < PairMerge<S>::kSlices;
#pragma unroll 1
    for (int cta = segment.first; cta <= segment.last; cta = room.merge_next) {
      __syncthreads();
      if (warp == 0) list_parts<S>(p, segment, cta, list, most, room, lane);
      __syncthreads();
      const int count = room.merge_parts, thread = 32 * warp + lane;
      if (thread < count)
        codes[thread] = __ldcg(reinterpret_cast<const int32_t*>(list[thread] + p.team_warps * sizeof(Stored)));
#pragma unroll 8
      for (int i = thread; i < count * kWords; i += 32 * kWarps)
        reinterpret_cast<uint4*>(states)[i] =
            __ldcg(reinterpret_cast<const uint4*>(list[i / kWords] + columns_of * sizeof(Stored)) + i % kWords);
      __syncthreads();
      if (mine) pairs.take(states, codes, count);
    }
    __syncthreads();
    if (mine) pairs.store(room.level(p, 3, columns_of));
  }
}

}  // namespace kvarn::cuda
