// SPDX-License-Identifier: Apache-2.0
// The end of a CTA: what its lists were left with, folded by all warps. A segment that it has to itself is finished; of
// one that it shares with other CTAs its parts go to global memory, and the last CTA to arrive folds the parts of all.
#pragma once

#include "cuda/attend_finish.cuh"
#include "cuda/attend_slices.cuh"

namespace kvarn::cuda {

template <class S, int kWarps>
class Merge {
 public:
  using Stored = StoredState<S::head_dim>;

  __device__ Merge(const AttendParameters& p, RoomOf<S> room, int warp, int lane)
      : p_(p), room_(room), end_(*reinterpret_cast<Ending*>(room.base + p.in.ending_at)), warp_(warp), lane_(lane) {}

  __device__ void run() {
    const int count = room_->left_count;
    if (count == 0) return;
    for_slices(count, [&](int i, int rank, int slice) { fold_lists(room_->left[i], rank, slice); });
    __syncthreads();
    if (warp_ < count && lane_ == 0 && room_->left[warp_].steps > 0) arrive_at(room_->left[warp_]);
    int column = warp_;
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      if (room_->left[i].steps == 0)
        finish_columns(room_->left[i], reinterpret_cast<Stored*>(room_->left[i].whole), column);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      if (room_->left[i].merges) merge(room_->left[i]);
  }

 private:
  static constexpr int kSlices = S::head_dim / 32;
  static_assert(most_block_columns(S::head_dim) / kQuadColumns * kSlices * sizeof(PartSlice) ==
                part_bytes(S::head_dim));

  template <class Body>
  __device__ void for_slices(int segments, Body body) {
    const int each = p_.in.team_quads() * kSlices;
    int task = warp_;
#pragma unroll 1
    for (int i = 0; i < segments; ++i, task -= each)
#pragma unroll 1
      for (; task < each; task += kWarps) body(i, task / kSlices, task % kSlices);
  }
  // Of the states of a segment's quads. A warp has every kWarps-th column, of all segments that are finished at a time.
  __device__ void finish_columns(const Left& left, Stored* totals, int& column) const {
#pragma unroll 1
    for (; column < left.target.columns; column += kWarps)
      finish_column<S>(room_->parameters, left.target, left.head, column, totals[column / kQuadColumns], lane_);
    column -= left.target.columns;
  }
  // What the lists were left with of a segment; to where the first of it was, if that is all, or to where it waits for
  // other CTAs' parts.
  __device__ void fold_lists(Left& left, int rank, int slice) {
    SliceFold fold(end_.waiting[warp_], lane_);
    const int offset = rank * static_cast<int>(sizeof(Stored)) + slice * static_cast<int>(sizeof(Slice));
    // A lane has a list: where its pieces of the segment begin, and how many they are.
    const int list = left.first + lane_, lists = left.last - left.first + 1;
    int begin = 0, count = 0;
    if (lane_ < lists) {
      const Pieces all = room_->counts[list * p_.in.team_warps];
      if (left.begins && lane_ == 0) begin = all.last_segment;
      count = (left.ends && list == left.last ? all.first_segment : all.count) - begin;
    }
#pragma unroll 1
    for (int i = 0; i < lists; ++i) {
      const Piece* next = room_.pieces((left.first + i) * p_.in.team_warps) + __shfl_sync(~0u, begin, i);
#pragma unroll 1
      for (int left_of_it = __shfl_sync(~0u, count, i); left_of_it > 0; --left_of_it, ++next) {
        const Piece piece = *next;
        Slice* at = reinterpret_cast<Slice*>(room_.at(piece.place) + offset);
        State<1> state;
        load_state(state, at, lane_);
        fold.take(state, at, piece.rank, piece.next);
      }
    }
    __syncwarp();
    if (left.steps == 0) {
      Slice* whole = fold.at();
      fold.leave([&](int, const State<1>& state, int, int) { store_state(state, whole, lane_); });
      if (rank == 0 && slice == 0 && lane_ == 0) left.whole = reinterpret_cast<uint8_t*>(whole);
      return;
    }
    fold.leave([&](int i, const State<1>& state, int before, int next) {
      PartSlice* to = part(static_cast<int>(blockIdx.x), i, left.end == 1, rank, slice);
      store_state(state, &to->slice, lane_);
      if (lane_ == 0) to->ranks = make_int4(before, next, 0, 0);
    });
  }

  // Makes this CTA's parts of a segment known, by one thread.
  __device__ void arrive_at(Left& left) {
    uint32_t* counter = &p_.plan.counters[left.first_cta];
    const auto steps = static_cast<uint32_t>(left.steps);
    left.merges = add_and_fence(counter, steps) + steps == static_cast<uint32_t>(left.all_steps);
    if (left.merges) *counter = 0;
  }

  // A slice of a CTA's parts: of the segment that it did not begin those from the first place on, of the one that it
  // only began those from the last place back.
  __device__ PartSlice* part(int cta, int index, bool tail, int rank, int slice) const {
    const int64_t place = int64_t{cta} * p_.max_parts + (tail ? p_.max_parts - 1 - index : index);
    return reinterpret_cast<PartSlice*>(p_.plan.parts + place * part_bytes(S::head_dim)) + rank * kSlices + slice;
  }

  // By the whole CTA, where states and slots were: a warp has a slice, and room for that of the parts. The results lie
  // where queries were.
  __device__ void merge(const Left& left) {
    Stored* merged = reinterpret_cast<Stored*>(room_.queries(0));
    for_slices(1, [&](int, int rank, int slice) { merge_slice(left, rank, slice, &merged[rank].slices[slice]); });
    __syncthreads();
    int column = warp_;
    finish_columns(left, merged, column);
    __syncthreads();
  }

  __device__ void merge_slice(const Left& left, int rank, int slice, Slice* merged) {
    const int most = (p_.in.ending_at - p_.in.states_at) / static_cast<int>(kWarps * sizeof(PartSlice));
    PartSlice* copies = reinterpret_cast<PartSlice*>(room_.base + p_.in.states_at) + warp_ * most;
    SliceFold fold(end_.waiting[warp_], lane_);
    int before = 0;  // parts of the CTAs before
#pragma unroll 1
    for (int base = left.first_cta; base <= left.last_cta; base += 32) {
      // A lane has a CTA.
      const int cta = base + lane_;
      int count = 0;
      if (base == left.first_cta)
        count = left.parts[lane_];
      else if (cta <= left.last_cta)
        count = parts_of(p_, left, p_.plan.blocks[left.block], cta);
      int until = count;  // inclusive scan
#pragma unroll 1
      for (int o = 1; o < 32; o *= 2) {
        const int other = __shfl_up_sync(~0u, until, o);
        if (lane_ >= o) until += other;
      }
      const int all = __shfl_sync(~0u, until, 31);
      const auto its = [&](int i) { return part(cta, i, cta == left.first_cta, rank, slice); };
      const int fit = max(0, min(all, most - before));
      const int first = until - count, mine = max(0, min(count, fit - first));
      begin_slices(mine);
#pragma unroll 1
      for (int i = 0; i < mine; ++i) copy_slice(copies + before + first + i, its(i));
      wait_for_slices();
#pragma unroll 1
      for (int i = before; i < before + fit; ++i) take(fold, copies + i);
      // What there is no room for is folded where it is.
#pragma unroll 1
      for (int i = fit; i < all; ++i) {
        const int owner = __ffs(static_cast<int>(__ballot_sync(~0u, until > i))) - 1;
        const uint64_t address = lane_ == owner ? reinterpret_cast<uint64_t>(its(i - first)) : 0;
        take(fold, reinterpret_cast<PartSlice*>(__shfl_sync(~0u, address, owner)));
      }
      before += fit;
    }
    fold.leave([&](int, const State<1>& state, int, int) { store_state(state, merged, lane_); });
  }
  __device__ void take(SliceFold& fold, PartSlice* part) const {
    State<1> state;
    load_state(state, &part->slice, lane_);
    fold.take(state, &part->slice, part->ranks.x, part->ranks.y);
  }
  // A lane's copies of whole slices, and the warp's wait for those of all lanes.
  __device__ void begin_slices(int count) {
    order_before_copies();
    expect_bytes(&room_->parts_full[warp_], static_cast<uint32_t>(count * sizeof(PartSlice)), 1);
  }
  __device__ void copy_slice(PartSlice* to, const PartSlice* from) {
    if constexpr (kLanesCopy) {
      for (uint32_t i = 0; i < sizeof(PartSlice); i += 16)
        copy_chunk(reinterpret_cast<uint8_t*>(to) + i, reinterpret_cast<const uint8_t*>(from) + i);
    } else {
      copy_stretch(to, from, sizeof(PartSlice), &room_->parts_full[warp_], lane_, once_);
    }
  }
  __device__ void wait_for_slices() {
    if constexpr (kLanesCopy) {
      wait_for_chunks();
    } else {
      wait(&room_->parts_full[warp_], parity_);
      parity_ ^= 1;
    }
    __syncwarp();
  }

  const AttendParameters& p_;
  const RoomOf<S> room_;
  Ending& end_;
  const int warp_, lane_;
  uint32_t parity_ = 0;
  ReadOnce once_;
};

}  // namespace kvarn::cuda
