// SPDX-License-Identifier: Apache-2.0
// Shared memory of attention's CTA, and what its warps tell each other there.
//
// Two warps load, teams of warps compute, one warp folds their results in order, one rotates queries ahead. Everything is
// handed over through barriers, and every slot belongs to one team: a team that waits for a slot's next round has
// consumed the round before, so that a barrier's parity tells all there is to know.
#pragma once

#include "cuda/attend.hpp"
#include "cuda/attend_raw.cuh"
#include "cuda/barrier.cuh"

namespace kvarn::cuda {

inline constexpr int kComputingWarps = 8, kFoldingWarp = 8, kQueryWarp = 9, kKeyWarp = 10, kValueWarp = 11;
inline constexpr int kWarps = 12;
inline constexpr int kMaxTeamWarps = 4, kMaxSlots = 32, kMaxResults = 16;

// A step of a unit, as the loading warp leaves it for the team.
struct alignas(16) Item {
  const uint8_t* from;        // packed: the record
  int32_t segment, position;  // of the CTA's segments; of the first token
  uint32_t flags;
  int32_t head;                // raw: where its tokens are
  int16_t raw_slot, valid;     // raw: of the workspace, or -1; how many tokens there are from the first one on
};
inline constexpr uint32_t kItemRaw = 1;                   // of a raw unit
inline constexpr uint32_t kItemEmpty = 2;                 // the unit has no such step
inline constexpr uint32_t kItemFirst = 4, kItemLast = 8;  // of a run
inline constexpr uint32_t kItemEdge = 16;                 // there is a token here that some row of the block does not see

// Segments that this CTA has to merge when its share is done: at most the first and the last of it.
struct MergeList {
  struct Segment {
    int32_t block, head, first, last;  // and the CTAs that left parts
  } segments[2];
  int32_t count;
};

template <class S>
struct Room {
  using Stored = StoredState<S::head_dim>;
  Barrier keys_full[kMaxSlots], keys_empty[kMaxSlots], values_full[kMaxSlots], values_empty[kMaxSlots];
  Barrier results_full[kMaxResults], results_empty[kMaxResults];              // of runs
  Barrier queries_full[kComputingWarps], queries_empty[kComputingWarps];      // of segments, as many as teams
  Item items[kMaxSlots];                                                      // of the K slots
  QueryColumn columns[kComputingWarps * kWarpColumns];                        // [teams][4 team_warps]
  int32_t merge_parts, merge_next;
  MergeList merges;
  // then: queries [teams][4 team_warps][D] f32, levels [4][team_warps], results [results][team_warps], K slots, V slots

  // Offsets from the start, not pointers made of integers: the compiler must see that they stay in shared memory.
  static constexpr int kQueryBytes = 4 * kWarpColumns * S::head_dim;
  static constexpr int kLevels = 4;  // piece, group, chapter, segment
  static constexpr int kStoredBytes = static_cast<int>(sizeof(Stored));
  static constexpr int levels_at(int warps) { return static_cast<int>(sizeof(Room)) + warps * kQueryBytes; }
  static constexpr int results_at(int warps, int team_warps) {
    return levels_at(warps) + kLevels * team_warps * kStoredBytes;
  }
  static constexpr int slots_at(int teams, int team_warps, int results) {
    return (results_at(teams * team_warps, team_warps) + results * team_warps * kStoredBytes + 127) / 128 * 128;
  }
  __device__ uint8_t* bytes() { return reinterpret_cast<uint8_t*>(this); }
  __device__ float* queries(const AttendParameters& p, int slot, int warp) {
    return reinterpret_cast<float*>(bytes() + sizeof(Room) + (slot * p.team_warps + warp) * kQueryBytes);
  }
  __device__ Stored& level(const AttendParameters& p, int level, int warp) {
    return reinterpret_cast<Stored*>(bytes() + levels_at(p.teams * p.team_warps))[level * p.team_warps + warp];
  }
  __device__ Stored& result(const AttendParameters& p, int slot, int warp) {
    return reinterpret_cast<Stored*>(bytes() + results_at(p.teams * p.team_warps, p.team_warps))[slot * p.team_warps + warp];
  }
  __device__ uint8_t* slots(const AttendParameters& p) { return bytes() + slots_at(p.teams, p.team_warps, p.results); }
};

// What a slot must hold: a record's K or V part, or 16 raw tokens.
template <class S>
struct SlotBytes {
  static constexpr int key_part = static_cast<int>(S::layout.v_codes), value_part = S::record_bytes - key_part;
  static constexpr int raw = kRawStep * kRawRowBytes<S>;
  static constexpr int keys = (std::max(key_part, raw) + 127) / 128 * 128;
  static constexpr int values = (std::max(value_part, raw) + 127) / 128 * 128;
};

// Bytes of all slots; of results and slots together, which merging uses in the end.
template <class S>
__host__ __device__ inline int slots_bytes(const AttendParameters& p) {
  return p.teams * (p.key_depth * SlotBytes<S>::keys + p.value_depth * SlotBytes<S>::values);
}
template <class S>
__host__ __device__ inline int merge_bytes(const AttendParameters& p) {
  return p.results * p.team_warps * Room<S>::kStoredBytes + slots_bytes<S>(p);
}

}  // namespace kvarn::cuda
