// SPDX-License-Identifier: Apache-2.0
// The loading warps, one for K parts and one for V parts: every item of the CTA's share into a slot of its team, in order.
// Lanes work out 32 items at once and each issues its own, so that an item costs one wait for its slot and some 40
// instructions: a warp that does more than that for an item every 0.4 us is what the others wait for.
#pragma once

#include "cuda/attend_room.cuh"
#include "cuda/attend_share.cuh"
#include "cuda/device.cuh"

namespace kvarn::cuda {

template <class S, bool kKeys>
class Loader {
 public:
  // early: packed tiles may be read before the kernel before has ended.
  __device__ Loader(const AttendParameters& p, const Cut& cut, Room<S>& room, int lane, bool early)
      : p_(p),
        cut_(cut),
        room_(room),
        schedule_(p, cut),
        slots_(room.slots(p) + (kKeys ? 0 : p.teams * p.key_depth * SlotBytes<S>::keys)),
        lane_(lane),
        early_(early) {}

  __device__ void run() {
    if (!early_) wait_for_previous();
    const int items = schedule_.items(), depth = kKeys ? p_.key_depth : p_.value_depth;
    Barrier *full = kKeys ? room_.keys_full : room_.values_full, *empty = kKeys ? room_.keys_empty : room_.values_empty;
    Place base;
    if (items > 0) base.begin(p_, cut_);
    int team = 0, turn = 0;  // item % teams; which of the team's slots
    uint32_t parity = 1;     // the first round finds empty slots
#pragma unroll 1
    for (int first = 0; first < items; first += 32) {
      base.advance(p_, schedule_.least_unit(first) - base.number, cut_.units);
      int32_t pages[kRawPages] = {};
      const Item mine = first + lane_ < items ? item_of(base, first + lane_, pages) : Item{};
      const unsigned raw = __ballot_sync(~0u, (mine.flags & kItemRaw) != 0);
      const unsigned none = __ballot_sync(~0u, (mine.flags & kItemEmpty) != 0);
#pragma unroll 1
      for (int k = 0; k < min(32, items - first); ++k) {
        const int slot = team * depth + turn;
        wait(empty + slot, parity);
        if (kKeys && lane_ == k) room_.items[slot] = mine;
        load(mine, pages, k, raw >> k & 1, none >> k & 1, slots_ + slot * kSlotBytes, full + slot);
        if (++team == p_.teams) {
          team = 0;
          if (++turn == depth) turn = 0, parity ^= 1;
        }
      }
    }
    wait_for_previous();
  }

 private:
  static constexpr int kSlotBytes = kKeys ? SlotBytes<S>::keys : SlotBytes<S>::values;
  static constexpr int kPart = kKeys ? SlotBytes<S>::key_part : SlotBytes<S>::value_part;

  static constexpr int kN = S::raw_tokens_per_page;
  static constexpr int kRawPages = (kRawStep + kN - 2) / kN + 1;  // that a step's raw tokens may lie in

  // Where raw token o lies, from o / n; beyond the tile's room the last entry of it.
  __device__ static int raw_entry(int tile, int quotient) {
    return tile + (quotient == 0 ? S::pages_ahead : min(quotient, S::pages_ahead));
  }
  __device__ int32_t page(int request, int entry) const {
    return min(max(p_.block_table[request * p_.table_stride + entry], 0), static_cast<int32_t>(p_.page_count - 1));
  }

  // The lane's item; `base` is a place at or before its unit.
  __device__ Item item_of(const Place& base, int item, int32_t (&pages)[kRawPages]) const {
    int unit_number, step;
    schedule_.locate(item, unit_number, step);
    Place at = base;
    at.advance(p_, unit_number - at.number, cut_.units);
    const BlockPlan& b = p_.plan.blocks[at.block];
    const Unit unit = Unit::of<S>(b, p_.group, at.unit);
    const bool split = schedule_.splits(unit_number);
    Item made{};
    made.segment = at.segment;
    made.head = at.head;
    made.flags = (split || step == 0 ? kItemFirst : 0) | (split || step == kPieceTiles - 1 ? kItemLast : 0) |
                 (unit.first >= 0 ? kItemRaw : 0);
    if (step >= unit.steps) {
      made.flags |= kItemEmpty;
    } else if (unit.first >= 0) {
      const int token = unit.first + step * kRawStep;
      made.flags |= kItemEdge;
      made.position = unit.tile * S::page_tokens + token;
      made.raw_slot = static_cast<int16_t>(unit.which ? b.raw[1] : b.raw[0]);
      made.valid = static_cast<int16_t>(unit.valid - token);
      if (made.raw_slot < 0) {
#pragma unroll
        for (int i = 0; i < kRawPages; ++i) pages[i] = page(b.request, raw_entry(unit.tile, token / kN + i));
      }
    } else {
      const int tile = unit.tile + step, last = b.start + (b.first_column + b.columns - 1) / p_.group;
      made.position = tile * S::page_tokens;
      if (tile >= b.own_tile || (p_.window > 0 && made.position <= last - p_.window)) made.flags |= kItemEdge;
      made.from = p_.pages + page(b.request, tile) * p_.page_stride + int64_t{at.head} * S::record_bytes +
                  (kKeys ? 0 : SlotBytes<S>::key_part);
    }
    return made;
  }

  // Item `owner` of the batch, which that lane holds.
  __device__ void load(const Item& mine, const int32_t (&pages)[kRawPages], int owner, bool raw, bool none, uint8_t* to,
                       Barrier* barrier) {
    if (none) {
      expect_nothing(barrier, lane_ == owner);
    } else if (raw) {
      load_raw(mine, pages, owner, to, barrier);
    } else {
#if __CUDA_ARCH__ >= 900
      if (lane_ == owner) {
        expect_bytes(barrier, kPart);
        copy_row(to, mine.from, kPart, barrier, once_);
      }
#else
      const uint64_t from = __shfl_sync(~0u, reinterpret_cast<uint64_t>(mine.from), owner);
      copy_stretch(to, reinterpret_cast<const uint8_t*>(from), kPart, barrier, lane_, once_);
      finish_copies(barrier);
#endif
    }
  }

  __device__ void load_raw(const Item& mine, const int32_t (&pages)[kRawPages], int owner, uint8_t* to,
                           Barrier* barrier) {
    if (early_) wait_for_previous(), early_ = false;
    const int position = __shfl_sync(~0u, mine.position, owner), head = __shfl_sync(~0u, mine.head, owner);
    const int raw_slot = __shfl_sync(~0u, int{mine.raw_slot}, owner), valid = __shfl_sync(~0u, int{mine.valid}, owner);
    constexpr int kRow = 2 * S::head_dim;
    const int first = position % S::page_tokens, token = first + min(lane_ % kRawStep, valid - 1);
    int page = 0;
#pragma unroll
    for (int i = 0; i < kRawPages; ++i) {
      const int candidate = __shfl_sync(~0u, pages[i], owner);
      if (token / kN == first / kN + i) page = candidate;
    }
    expect_copies(barrier, kRawStep * kRow, lane_ == owner);
    if (lane_ < kRawStep) {
      // Beyond the last token of the tile the last one is read again: what p = 0 multiplies must be finite.
      const uint8_t* from;
      if (raw_slot >= 0) {
        const int64_t matrix = (int64_t{raw_slot} * p_.heads + head) * 2 + (kKeys ? 0 : 1);
        from = reinterpret_cast<const uint8_t*>(p_.plan.raw) + (matrix * S::page_tokens + token) * kRow;
      } else {
        from = p_.pages + page * p_.page_stride + int64_t{head} * S::record_bytes + (token % kN + (kKeys ? 0 : kN)) * kRow;
      }
      copy_row(to + lane_ * kRawRowBytes<S>, from, kRow, barrier, once_);
    }
    finish_copies(barrier);
  }

  const AttendParameters& p_;
  const Cut& cut_;
  Room<S>& room_;
  Schedule schedule_;
  uint8_t* slots_;
  int lane_;
  bool early_;
  ReadOnce once_;
};

}  // namespace kvarn::cuda
