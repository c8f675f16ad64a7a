// SPDX-License-Identifier: Apache-2.0
// Partial results, folded a slice of 32 channels at a time: at the end of a CTA its warps share a state's slices.
#pragma once

#include "cuda/attend_order.cuh"
#include "cuda/attend_room.cuh"

namespace kvarn::cuda {

// One slice of partial results, folded in order by a warp. The topmost stays in registers; beneath it, waiting[] tells
// where the others lie.
class SliceFold {
 public:
  __device__ SliceFold(Waiting* waiting, int lane) : waiting_(waiting), lane_(lane) {}

  // What was read from `at`, which may be overwritten; the ranks before and behind it.
  __device__ void take(const State<1>& state, Slice* at, int rank, int next) {
    next_ = next;
    if (at_ != nullptr && rank < next && rank_ > rank) {
      fold(top_, state, top_);
    } else {
      if (at_ != nullptr) push();
      top_ = state, at_ = at, rank_ = rank;
    }
#pragma unroll 1
    while (depth_ > 0 && rank_ < next && below_.rank > rank_) {
      State<1> earlier;
      load_state(earlier, below_.at, lane_);
      fold(earlier, top_, top_);
      rank_ = below_.rank, at_ = below_.at;
      if (--depth_ > 0) below_ = waiting_[depth_ - 1];
    }
  }
  // Where the first of what the topmost is made of was.
  __device__ Slice* at() const { return at_; }
  // What is left, in order: write(index, state, rank, next).
  template <class Write>
  __device__ void leave(Write write) {
#pragma unroll 1
    for (int i = 0; i < depth_; ++i) {
      State<1> state;
      load_state(state, waiting_[i].at, lane_);
      write(i, state, waiting_[i].rank, i + 1 < depth_ ? waiting_[i + 1].rank : rank_);
    }
    write(depth_, top_, rank_, next_);
  }

 private:
  __device__ void push() {
    below_ = {at_, rank_};
    __syncwarp();
    store_state(top_, at_, lane_);
    if (lane_ == 0) waiting_[depth_] = below_;
    ++depth_;
    __syncwarp();
  }
  Waiting* waiting_;
  State<1> top_;
  Slice* at_ = nullptr;
  Waiting below_{nullptr, 0};
  int lane_, rank_ = 0, next_ = 0, depth_ = 0;
};

}  // namespace kvarn::cuda
