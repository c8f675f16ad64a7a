// SPDX-License-Identifier: Apache-2.0
// The loading warps: they bring every step of the teams' lists, K part and V part apart. A lane has one list's K or V
// parts: it looks whether the next slot is empty, and if so starts the copy; no list waits for another. Raw tokens are
// copied by the whole warp, for one lane after the other.
#pragma once

#include "cuda/attend_walk.cuh"
#include "cuda/device.cuh"

namespace kvarn::cuda {

template <class S, int kComputingWarps, int kLoaders>
class Loader {
 public:
  // early: packed tiles may be read before the kernel before has ended.
  __device__ Loader(const AttendParameters& p, RoomOf<S> room, int loader, int lane, bool early)
      : p_(p), room_(room), list_(p), loader_(loader), lane_(lane), keys_(is_of_keys(lane)), early_(early) {}

  __device__ void run() {
    if (!early_) wait_for_previous();
    // Of teams of one warp, or few teams, it has neighbours; of others every fourth (docs/kernels.md).
    const bool neighbours = kLists > 1 && (kComputingWarps == 8 || p_.in.team_warps == 1);
    const int first = neighbours ? loader_ * p_.in.teams / kLoaders : loader_,
              end = neighbours ? (loader_ + 1) * p_.in.teams / kLoaders : p_.in.teams,
              team = first + (neighbours ? 1 : kLoaders) * (lane_ % kLists),
              depth = keys_ ? p_.in.key_depth : p_.in.value_depth;
    if (lane_ < 2 * kLists && team < end)
      list_.begin(share_of(p_, static_cast<int>(blockIdx.x) * p_.in.teams + team, 1));
    Slots slots(keys_ ? room_->keys_full : room_->values_full, team * depth, 1);  // the first round finds them empty
    const Shared all_slots = keys_ ? room_.keys(0) : room_.values(0);
    const uint32_t slot_size = keys_ ? RoomOf<S>::key_slot : RoomOf<S>::value_slot;
#pragma unroll 1
    while (__any_sync(~0u, list_.left > 0)) {
      const Shared empty = slots.empty();
      bool ready;
      do {
        ready = list_.left > 0 && ended(empty, slots.parity);
      } while (!__any_sync(~0u, ready));
      // Again, to wait as the sanitizer knows it; by the whole warp where all lanes copy, or did when the slot was last
      // used.
      history_ = ready ? history_ << 1 | (kLanesCopy || list_.raw ? 1 : 0) : history_;
      const bool shared = ready && (history_ & ((2u << depth) - 1)) != 0;
      if (ready && !shared) wait(empty, slots.parity);
#pragma unroll 1
      for (unsigned owners = __ballot_sync(~0u, shared); owners != 0; owners &= owners - 1) {
        const int owner = __ffs(static_cast<int>(owners)) - 1;
        wait(of_lane(empty, owner), __shfl_sync(~0u, slots.parity, owner));
      }
      if (ready && keys_) room_->items[slots.next] = list_.item();
      const Shared to = all_slots + slots.next * slot_size;
      load_packed(ready && !list_.raw, to, slots.full);
#pragma unroll 1
      for (unsigned owners = __ballot_sync(~0u, ready && list_.raw); owners != 0; owners &= owners - 1)
        load_raw(__ffs(static_cast<int>(owners)) - 1, to, slots.full);
      if (ready) {
        list_.advance();
        slots.advance(depth);
      }
    }
    if (early_) wait_for_previous();
  }

 private:
  static constexpr int kLists = kComputingWarps / kLoaders;
  __device__ static bool is_of_keys(int lane) { return lane < kLists; }

  __device__ uint8_t* record(int32_t page, int head) const {
    const auto last = static_cast<int32_t>(p_.page_count - 1);
    return p_.pages + min(max(page, 0), last) * p_.page_stride + head * int64_t{S::record_bytes};
  }

  // Of every lane that asks for it, its packed part.
  __device__ void load_packed(bool wanted, Shared to, Shared full) {
    const uint32_t part = keys_ ? RoomOf<S>::key_part : RoomOf<S>::value_part;
    const auto from = [&] { return record(list_.pages[0], list_.head) + (keys_ ? 0 : RoomOf<S>::key_part); };
    if constexpr (kLanesCopy) {
      const uint8_t* at = from();
#pragma unroll 1
      for (unsigned owners = __ballot_sync(~0u, wanted); owners != 0; owners &= owners - 1) {
        const int owner = __ffs(static_cast<int>(owners)) - 1;
        const Shared its = of_lane(full, owner);
        copy_stretch(of_lane(to, owner), of_lane(at, owner), __shfl_sync(~0u, part, owner), its, lane_, once_);
        finish_chunks(its);
      }
    } else if (wanted) {
      expect_bytes(full, part, kCopyArrivals);
      copy_stretch(to, from(), part, full, lane_, once_);
    }
  }

  __device__ static Shared of_lane(Shared at, int lane) { return Shared(__shfl_sync(~0u, at.address, lane)); }
  __device__ static const uint8_t* of_lane(const uint8_t* pointer, int lane) {
    return reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(pointer), lane));
  }

  // The raw tokens of lane `owner`'s step.
  __device__ void load_raw(int owner, Shared to, Shared full) {
    if (early_) wait_for_previous(), early_ = false;
    constexpr int kRow = 2 * S::head_dim;
    const int raw_slot = __shfl_sync(~0u, list_.raw_slot, owner), head = __shfl_sync(~0u, list_.head, owner);
    const int first = __shfl_sync(~0u, list_.token, owner), tokens = __shfl_sync(~0u, list_.tokens, owner);
    const bool keys = is_of_keys(owner);
    // A lane works out where a row lies. Beyond the tile's last token its V is read again, since what p = 0 multiplies
    // must be finite; K there is hidden.
    const int token = first + min(lane_, tokens - 1), which = token / Walk<S>::kN - first / Walk<S>::kN;
    int page = __shfl_sync(~0u, list_.pages[0], owner);
#pragma unroll
    for (int k = 1; k < Walk<S>::kRawPages; ++k) {
      const int other = __shfl_sync(~0u, list_.pages[k], owner);
      page = which == k ? other : page;
    }
    const uint8_t* row_at =
        raw_slot >= 0
            ? reinterpret_cast<const uint8_t*>(p_.plan.raw) +
                  (((int64_t{raw_slot} * p_.heads + head) * 2 + (keys ? 0 : 1)) * S::page_tokens + token) * kRow
            : record(page, head) + ((keys ? 0 : Walk<S>::kN) + token % Walk<S>::kN) * kRow;
    to = of_lane(to, owner), full = of_lane(full, owner);
    // 16 bytes a lane: bulk copies of rows that are to lie apart in shared memory would be issued one after the other.
    constexpr int kLanes = S::head_dim / 8, kRows = 32 / kLanes;  // lanes of a row, rows of a round
    static_assert(kLanes <= 32 && Walk<S>::kRawStep <= 32);
    const int chunk = 16 * (lane_ % kLanes), rows = keys ? min(tokens, Walk<S>::kRawStep) : Walk<S>::kRawStep;
    int row = lane_ / kLanes;
    Shared target = to + (row * kRawRowBytes<S> + chunk);
#pragma unroll 4
    for (int base = 0; base < rows; base += kRows, row += kRows, target = target + kRows * kRawRowBytes<S>) {
      const uint8_t* source = of_lane(row_at, row);
      if (row < rows && lane_ < kRows * kLanes) copy_chunk(target, source + chunk);
    }
    finish_chunks(full);
  }

  const AttendParameters& p_;
  const RoomOf<S> room_;
  Walk<S> list_;  // the lane's
  const int loader_, lane_;
  const bool keys_;
  bool early_;
  ReadOnce once_;
  uint32_t history_ = 0;  // bit k: all lanes copied the step k before
};

}  // namespace kvarn::cuda
