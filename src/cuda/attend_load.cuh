// SPDX-License-Identifier: Apache-2.0
// The loading warps: they bring every step of the teams' lists, K part and V part apart. A lane has one list's K or V
// parts: it looks whether the next slot is empty, and if so starts the copy; no list waits for another. Raw tokens are
// copied by the whole warp, for one lane after the other.
#pragma once

#include "cuda/attend_order.cuh"
#include "cuda/attend_room.cuh"
#include "cuda/device.cuh"

namespace kvarn::cuda {

template <class S, int kComputingWarps>
class Loader {
 public:
  // early: packed tiles may be read before the kernel before has ended.
  __device__ Loader(const AttendParameters& p, RoomOf<S> room, int loader, int lane, bool early)
      : p_(p), room_(room), loader_(loader), lane_(lane), keys_(is_of_keys(lane)), early_(early) {}

  __device__ void run() {
    if (!early_) wait_for_previous();
    // Of teams of one warp, or few teams, it has neighbours; of others every fourth (docs/kernels.md).
    const bool neighbours = kComputingWarps == 8 || p_.in.team_warps == 1;
    const int first = neighbours ? loader_ * p_.in.teams / kLoadingWarps : loader_,
              end = neighbours ? (loader_ + 1) * p_.in.teams / kLoadingWarps : p_.in.teams,
              team = first + (neighbours ? 1 : kLoadingWarps) * (lane_ % kLists),
              depth = keys_ ? p_.in.key_depth : p_.in.value_depth;
    if (lane_ < 2 * kLists && team < end) {
      const Share list = share_of(p_, static_cast<int>(blockIdx.x) * p_.in.teams + team, 1);
      left_ = list.steps();
      if (left_ > 0) begin(list.begin);
    }
    int slot = team * depth, turn = 0;
    uint32_t parity = 1;  // the first round finds empty slots
#pragma unroll 1
    while (__any_sync(~0u, left_ > 0)) {
      Barrier *empty = (keys_ ? room_->keys_empty : room_->values_empty) + slot,
              *full = (keys_ ? room_->keys_full : room_->values_full) + slot;
      const bool ready = left_ > 0 && ended(empty, parity);
      // Again, to wait as the sanitizer knows it; by the whole warp where several lanes copy, or all did when the slot
      // was last used.
      history_ = ready ? history_ << 1 | (raw_ ? 1 : 0) : history_;
      const unsigned copying = __ballot_sync(~0u, ready);
      const bool shared = ready && ((copying & (copying - 1)) != 0 || (history_ & ((2u << depth) - 1)) != 0);
      if (ready && !shared) wait(empty, parity);
#pragma unroll 1
      for (unsigned owners = __ballot_sync(~0u, shared); owners != 0; owners &= owners - 1) {
        const int owner = __ffs(static_cast<int>(owners)) - 1;
        wait(of_lane(empty, owner), __shfl_sync(~0u, parity, owner));
      }
      if (ready && keys_) room_->items[slot] = item();
      uint8_t* to = keys_ ? room_.keys(slot) : room_.values(slot);
      load_packed(ready && !raw_, to, full);
#pragma unroll 1
      for (unsigned owners = __ballot_sync(~0u, ready && raw_); owners != 0; owners &= owners - 1)
        load_raw(__ffs(static_cast<int>(owners)) - 1, to, full);
      if (ready) {
        advance();
        ++slot;
        if (++turn == depth) slot -= depth, turn = 0, parity ^= 1;
      }
    }
    if (early_) wait_for_previous();
  }

 private:
  static constexpr int kLists = kComputingWarps / kLoadingWarps;
  __device__ static bool is_of_keys(int lane) { return lane < kLists; }

  static constexpr int kN = S::raw_tokens_per_page;
  static constexpr int kRawStep = raw_step(S::layout);
  static constexpr int kRawPages = (kRawStep + kN - 2) / kN + 1;  // that a step's raw tokens may lie in

  __device__ void begin(const Cut& cut) {
    block_ = cut.block, head_ = cut.head, step_ = cut.step;
    b_ = p_.plan.blocks[block_];
    next_ = rank_of(b_, step_);
    fresh_ = true;
    locate();
  }
  __device__ void advance() {
    if (--left_ == 0) return;
    if (++step_ == b_.steps) {
      step_ = 0;
      if (++head_ == p_.heads) {
        head_ = 0;
        b_ = p_.plan.blocks[++block_];
      }
      next_ = kRankBegins;
    }
    locate();
  }

  // Where raw token o lies, from o / n; beyond the tile's room the last entry of it.
  __device__ static int raw_entry(int tile, int quotient) {
    return tile + (quotient == 0 ? S::pages_ahead : min(quotient, S::pages_ahead));
  }
  __device__ int32_t page(int entry) const {
    return min(max(__ldg(p_.block_table + b_.request * p_.table_stride + entry), 0),
               static_cast<int32_t>(p_.page_count - 1));
  }
  // What the step reads. Pages are looked up here, long before they are needed.
  __device__ void locate() {
    const int packed = packed_steps(b_);
    raw_ = step_ >= packed;
    rank_ = fresh_ ? next_ : rank_;
    next_ = rank_of(b_, step_ + 1);
    // The chain goes on in registers as long as it began before what follows.
    last_ = left_ == 1 || next_ >= 0 || rank_ <= next_;
    first_ = fresh_;
    fresh_ = last_;
    if (!raw_) {
      tile_ = b_.first_tile + step_, token_ = 0;
      pages_[0] = page(tile_);
      return;
    }
    const int raw = step_ - packed, which = raw >= b_.own_steps ? 1 : 0;
    tile_ = b_.own_tile + which;
    token_ = (raw - which * b_.own_steps) * kRawStep;
    tokens_ = own_tokens(b_, S::page_tokens, p_.group, which) - token_;
    raw_slot_ = which ? b_.raw[1] : b_.raw[0];
    if (raw_slot_ < 0) {
#pragma unroll
      for (int i = 0; i < kRawPages; ++i) pages_[i] = page(raw_entry(tile_, token_ / kN + i));
    }
  }
  __device__ Item item() const {
    const int position = tile_ * S::page_tokens + token_,
              last = b_.start + (b_.first_column + b_.columns - 1) / p_.group;
    const bool edge = raw_ || tile_ >= b_.own_tile || (p_.window > 0 && position <= last - p_.window);
    return {
        block_,   head_,
        position, (raw_ ? kItemRaw : 0) | (first_ ? kItemFirst : 0) | (last_ ? kItemLast : 0) | (edge ? kItemEdge : 0),
        rank_,    next_};
  }

  // Of every lane that asks for it, its packed part.
  __device__ void load_packed(bool wanted, uint8_t* to, Barrier* barrier) {
    const int part = keys_ ? RoomOf<S>::key_part : RoomOf<S>::value_part;
    const uint8_t* from =
        p_.pages + pages_[0] * p_.page_stride + int64_t{head_} * S::record_bytes + (keys_ ? 0 : RoomOf<S>::key_part);
#if __CUDA_ARCH__ >= 900
    if (wanted) {
      expect_bytes(barrier, static_cast<uint32_t>(part), kCopyArrivals);
      copy_stretch(to, from, static_cast<uint32_t>(part), barrier, lane_, once_);
    }
#else
#pragma unroll 1
    for (unsigned owners = __ballot_sync(~0u, wanted); owners != 0; owners &= owners - 1) {
      const int owner = __ffs(static_cast<int>(owners)) - 1;
      Barrier* its = of_lane(barrier, owner);
      copy_stretch(of_lane(to, owner), of_lane(from, owner), static_cast<uint32_t>(__shfl_sync(~0u, part, owner)), its,
                   lane_, once_);
      finish_chunks(its);
    }
#endif
  }

  template <class T>
  __device__ static T* of_lane(T* pointer, int lane) {
    return reinterpret_cast<T*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(pointer), lane));
  }

  // The raw tokens of lane `owner`'s step.
  __device__ void load_raw(int owner, uint8_t* to, Barrier* barrier) {
    if (early_) wait_for_previous(), early_ = false;
    constexpr int kRow = 2 * S::head_dim;
    const int raw_slot = __shfl_sync(~0u, raw_slot_, owner), head = __shfl_sync(~0u, head_, owner);
    const int first = __shfl_sync(~0u, token_, owner), tokens = __shfl_sync(~0u, tokens_, owner);
    const bool keys = is_of_keys(owner);
    // A lane works out where a row lies. Beyond the tile's last token its V is read again, since what p = 0 multiplies
    // must be finite; K there is hidden.
    const int token = first + min(lane_, tokens - 1), which = token / kN - first / kN;
    int page = __shfl_sync(~0u, pages_[0], owner);
#pragma unroll
    for (int k = 1; k < kRawPages; ++k) {
      const int other = __shfl_sync(~0u, pages_[k], owner);
      page = which == k ? other : page;
    }
    const uint8_t* row_at =
        raw_slot >= 0
            ? reinterpret_cast<const uint8_t*>(p_.plan.raw) +
                  (((int64_t{raw_slot} * p_.heads + head) * 2 + (keys ? 0 : 1)) * S::page_tokens + token) * kRow
            : p_.pages + page * p_.page_stride + int64_t{head} * S::record_bytes +
                  ((keys ? 0 : kN) + token % kN) * kRow;
    to = of_lane(to, owner), barrier = of_lane(barrier, owner);
    // 16 bytes a lane: bulk copies of rows that are to lie apart in shared memory would be issued one after the other.
    constexpr int kLanes = S::head_dim / 8, kRows = 32 / kLanes;  // lanes of a row, rows of a round
    static_assert(kLanes <= 32 && kRawStep <= 32);
    const int chunk = 16 * (lane_ % kLanes), rows = keys ? min(tokens, kRawStep) : kRawStep;
    int row = lane_ / kLanes;
    uint8_t* target = to + row * kRawRowBytes<S> + chunk;
#pragma unroll 4
    for (int base = 0; base < rows; base += kRows, row += kRows, target += kRows * kRawRowBytes<S>) {
      const uint8_t* source = of_lane(row_at, row);
      if (row < rows && lane_ < kRows * kLanes) copy_chunk(target, source + chunk);
    }
    finish_chunks(barrier);
  }

  const AttendParameters& p_;
  const RoomOf<S> room_;
  const int loader_, lane_;
  const bool keys_;
  bool early_;
  ReadOnce once_;
  // The lane's list: what is left of it, the step that is loaded next.
  int left_ = 0, block_ = 0, head_ = 0, step_ = 0, rank_ = 0, next_ = 0;
  bool raw_ = false, first_ = false, last_ = false, fresh_ = true;
  int tile_ = 0, token_ = 0, tokens_ = 1, raw_slot_ = 0;
  int32_t pages_[kRawPages] = {};
  uint32_t history_ = 0;  // bit k: the step k before was raw
  BlockPlan b_{};
};

}  // namespace kvarn::cuda
