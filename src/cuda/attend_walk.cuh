// SPDX-License-Identifier: Apache-2.0
// A list, step by step, as the lane that loads it goes through it.
#pragma once

#include "cuda/attend_order.cuh"
#include "cuda/attend_room.cuh"

namespace kvarn::cuda {

template <class S>
class Walk {
 public:
  static constexpr int kN = S::raw_tokens_per_page;
  static constexpr int kRawStep = raw_step(S::layout);
  static constexpr int kRawPages = (kRawStep + kN - 2) / kN + 1;  // that a step's raw tokens may lie in

  __device__ explicit Walk(const AttendParameters& p) : p_(p) {}

  __device__ void begin(const Share& list) {
    left = list.steps();
    if (left <= 0) return;
    take_block(list.begin.block);
    head = list.begin.head, step_ = list.begin.step;
    next_ = rank_of(b_, step_);
    locate();
  }
  // To the next step, if there is one.
  __device__ void advance() {
    if (--left == 0) return;
    if (++step_ == b_.steps) {
      step_ = 0;
      if (++head == p_.heads) {
        head = 0;
        take_block(block_ + 1);
      }
      next_ = kRankBegins;
    }
    locate();
  }
  __device__ Item item() const {
    const int position = tile_ * S::page_tokens + token;
    const bool edge = raw || tile_ >= b_.own_tile || (p_.window > 0 && position <= last_position_ - p_.window);
    return {block_, head, position, (raw ? kItemRaw : 0) | (last_ ? kItemLast : 0) | (edge ? kItemEdge : 0),
            rank_,  next_};
  }

  int left = 0;  // steps, with this one
  // What the step reads: KV head; raw tokens, from which of the tile on, how many, in which slot of the workspace or in
  // pages (-1); the page of the record, or pages of raw tokens, not clamped yet, so that nothing waits for them.
  int head = 0;
  bool raw = false;
  int token = 0, tokens = 1, raw_slot = 0;
  int32_t pages[kRawPages] = {};

 private:
  __device__ void take_block(int block) {
    block_ = block;
    b_ = p_.plan.blocks[block];
    last_position_ = last_position(b_, p_.group);
    table_ = p_.block_table + b_.request * p_.table_stride;
  }

  // Where raw token o lies, from o / n; beyond the tile's room the last entry of it.
  __device__ static int raw_entry(int tile, int quotient) {
    return tile + (quotient == 0 ? S::pages_ahead : min(quotient, S::pages_ahead));
  }
  __device__ int32_t page(int entry) const { return __ldg(table_ + entry); }
  // What the step reads. Pages are looked up here, long before they are needed.
  __device__ void locate() {
    const int packed = packed_steps(b_);
    raw = step_ >= packed;
    rank_ = fresh_ ? next_ : rank_;
    next_ = rank_of(b_, step_ + 1);
    // The chain goes on in registers as long as it began before what follows.
    last_ = left == 1 || next_ >= 0 || rank_ <= next_;
    fresh_ = last_;
    if (!raw) {
      tile_ = b_.first_tile + step_, token = 0;
      pages[0] = page(tile_);
      return;
    }
    const int number = step_ - packed, which = number >= b_.own_steps ? 1 : 0;
    tile_ = b_.own_tile + which;
    token = (number - which * b_.own_steps) * kRawStep;
    tokens = own_tokens(b_, S::page_tokens, last_position_, which) - token;
    raw_slot = which ? b_.raw[1] : b_.raw[0];
    if (raw_slot < 0) {
#pragma unroll
      for (int i = 0; i < kRawPages; ++i) pages[i] = page(raw_entry(tile_, token / kN + i));
    }
  }

  const AttendParameters& p_;
  BlockPlan b_{};
  int block_ = 0, step_ = 0, tile_ = 0, last_position_ = 0;
  const int32_t* table_ = nullptr;
  int rank_ = 0, next_ = 0;           // where what the step belongs to began; before the next step
  bool last_ = false, fresh_ = true;  // the step is the last of what it belongs to; the next one is the first
};

}  // namespace kvarn::cuda
