// SPDX-License-Identifier: Apache-2.0
// Shared memory of attention's CTA, and what its warps tell each other there.
//
// Teams of warps compute, each its own list of steps; other warps load for them. A step is handed over through
// barriers, and every slot belongs to one team: a team that waits for a slot's next round has consumed the round
// before, so that a barrier's parity tells all there is to know.
#pragma once

#include <cstddef>

#include "cuda/attend.hpp"
#include "cuda/attend_raw.cuh"
#include "cuda/barrier.cuh"

namespace kvarn::cuda {

inline constexpr int kLoadingWarps = 4;  // at least
inline constexpr int kMaxWarps = kMaxComputingWarps + kLoadingWarps;
inline constexpr int kMaxSlots = 32;
inline constexpr int kMaxStates = 60;  // of a quad: most_parts() of any length

// What a segment is about, of its block's plan.
struct Target {
  int32_t row, start, first_column, columns;
  __device__ static Target of(const BlockPlan& b) { return {b.row, b.start, b.first_column, b.columns}; }
};

// A step, as the loading warp leaves it for the team.
struct alignas(16) Item {
  int32_t block, head, position;  // position: of the first token
  uint32_t flags;
  int32_t rank, next;  // where the state began that the step belongs to; before the next step
};
inline constexpr uint32_t kItemRaw = 1;
inline constexpr uint32_t kItemLast = 2;  // of the steps that are chained in registers
inline constexpr uint32_t kItemEdge = 4;  // there is a token here that some row of the block does not see

// A partial result of a list: where the state of the team's first quad is (RoomOf::at), and the ranks before and behind
// it.
struct Piece {
  uint32_t place;
  int16_t rank, next;
};
// How many a warp still has; from which on they are of its last segment, up to which of its first.
struct Pieces {
  int32_t count, last_segment, first_segment;
};

// What is left of what a warp has folded: where, and the rank before it.
struct alignas(16) Waiting {
  Slice* at;
  int32_t rank;
};
// A segment that lists of the CTA were left with: it reaches over the end of a list.
struct Left {
  int32_t block, head, first, last;  // and the lists that have something of it
  bool begins, ends;                 // in those lists
  Target target;
  // If it reaches over an end of the CTA: the steps that the CTA has of it, and that there are; the CTAs that share it.
  int32_t steps, all_steps, first_cta, last_cta;  // steps 0: the CTA has it to itself
  int32_t end;                                    // 0: begun by an earlier CTA, 1: only begun by this one
  bool merges;                                    // this CTA does it: the others have arrived
  uint8_t* whole;                                 // the result, of one that the CTA has to itself
  uint8_t parts[32];                              // that the first CTAs of those that share it leave of it
};

struct Room {
  AttendParameters parameters;  // for functions that are not inlined: the kernel's own take them 0.4 us a cache line
  Barrier keys_full[kMaxSlots], keys_empty[kMaxSlots], values_full[kMaxSlots], values_empty[kMaxSlots];
  Barrier parts_full[kMaxWarps];
  Item items[kMaxSlots];  // of the K slots
  QueryColumn columns[kMaxQuads][kQuadColumns];
  Pieces counts[kMaxComputingWarps];  // of those below
  Left left[kMaxComputingWarps + 1];  // in order
  int32_t left_count;
  // then: pieces [warp][kMaxStates], that a warp still has, in order, the same for all of a team but for their places;
  // queries [quad][4] (query_stride), states [states][quad], K slots [team][depth], V slots
};

// The slots of a team's K parts, or of its V parts, one after the other, round after round: which one is next, and the
// barrier of its being full; that of its being empty lies behind.
struct Slots {
  Shared full;
  uint32_t parity;
  int next, first;

  __device__ Slots(const Barrier* all_full, int first, uint32_t parity)
      : full(all_full + first), parity(parity), next(first), first(first) {}
  __device__ Shared empty() const { return full + sizeof(Room::keys_full); }
  __device__ void advance(int depth) {
    full = full + sizeof(Barrier);
    if (++next == first + depth) {
      next = first, parity ^= 1;
      full = full + static_cast<uint32_t>(-depth * static_cast<int>(sizeof(Barrier)));
    }
  }
};
static_assert(offsetof(Room, keys_empty) - offsetof(Room, keys_full) == sizeof(Room::keys_full) &&
              offsetof(Room, values_empty) - offsetof(Room, values_full) == sizeof(Room::keys_full));

// Parts of shared memory begin at multiples of 128 bytes.
constexpr int aligned(int64_t bytes) { return static_cast<int>((bytes + 127) / 128 * 128); }
inline constexpr int kPiecesAt = aligned(sizeof(Room));

// The end of a CTA (attend_merge.cuh), where the slots were.
struct alignas(128) Ending {
  Waiting waiting[kMaxWarps][kMaxStates];
};

// A CTA's share, or a list: its cut, and the one behind it.
struct Share {
  Cut begin, end;
  __device__ int steps() const { return end.number - begin.number; }
};
__device__ inline Share share_of(const AttendParameters& p, int list, int lists) {
  return {p.plan.cuts[list], p.plan.cuts[list + lists]};
}

// What a slot must hold: a record's K or V part, or a step of raw tokens.
constexpr int key_part(const kvarn_layout& l) { return static_cast<int>(l.v_codes); }
constexpr int value_part(const kvarn_layout& l) { return static_cast<int>(l.record_bytes - l.v_codes); }
constexpr int slot_bytes(const kvarn_layout& l, int part) {
  return aligned(std::max(part, raw_step(l) * raw_row_bytes(l.head_dim)));
}

// The parts of the room, by bytes from its start: the compiler must see that they stay in shared memory.
template <class S>
struct RoomOf {
  using Stored = StoredState<S::head_dim>;
  static_assert(sizeof(Stored) == state_bytes(S::head_dim));
  static constexpr int key_part = cuda::key_part(S::layout), value_part = cuda::value_part(S::layout);
  static constexpr int key_slot = slot_bytes(S::layout, key_part), value_slot = slot_bytes(S::layout, value_part);

  const AttendParameters& p;
  uint8_t* base;
  // The same, for a function that is not inlined.
  __device__ RoomOf apart() const { return {(*this)->parameters, base}; }
  __device__ Room& operator*() const { return *reinterpret_cast<Room*>(base); }
  __device__ Room* operator->() const { return reinterpret_cast<Room*>(base); }
  __device__ Piece* pieces(int warp) const { return reinterpret_cast<Piece*>(base + kPiecesAt) + warp * kMaxStates; }
  __device__ float* queries(int quad) const {
    return reinterpret_cast<float*>(base + p.in.queries_at + quad * query_bytes(S::head_dim));
  }
  __device__ uint8_t* keys(int slot) const { return base + p.in.keys_at + slot * key_slot; }
  __device__ uint8_t* values(int slot) const { return base + p.in.values_at + slot * value_slot; }
  // A quad's partial result, those of a team one after the other. What shared memory has no room for lies in global
  // memory. A place is a number of 16 bytes from the beginning of one or the other.
  __device__ Stored& state(int quad, int index) const {
    return index < p.in.states ? reinterpret_cast<Stored*>(base + p.in.states_at)[index * p.in.quads() + quad]
                               : reinterpret_cast<Stored*>(spilled())[index * kMaxQuads + quad];
  }
  __device__ uint32_t place(int quad, int index) const {
    static_assert(sizeof(Stored) % 16 == 0);
    constexpr uint32_t kSize = sizeof(Stored) / 16;
    return index < p.in.states ? static_cast<uint32_t>(p.in.states_at) / 16 + (index * p.in.quads() + quad) * kSize
                               : kSpilled | (index * kMaxQuads + quad) * kSize;
  }
  __device__ uint8_t* at(uint32_t place) const {
    return ((place & kSpilled) != 0 ? spilled() : base) + 16 * (place & ~kSpilled);
  }

 private:
  __device__ uint8_t* spilled() const {
    return p.plan.spilled + int64_t{blockIdx.x} * p.max_parts * kMaxQuads * sizeof(Stored);
  }
  static constexpr uint32_t kSpilled = 1u << 31;
};

}  // namespace kvarn::cuda
