// SPDX-License-Identifier: Apache-2.0
// A computing warp: the steps of its team's list, against its own four columns. Steps that are chained stay in registers;
// what is complete is added to what the warp has before it, as far as the order allows, and a segment that lies in the list
// from its beginning to its end is finished here. The rest is left to the end of the CTA (attend_merge.cuh).
#pragma once

#include "cuda/attend_finish.cuh"
#include "cuda/attend_order.cuh"
#include "cuda/attend_queries.cuh"

namespace kvarn::cuda {

// Which tokens the lane's column sees; only steps at an edge need it.
template <class S, int kRowTiles, class Token>
__device__ inline void hide(const QueryColumn& column, const Item& item, float (&y)[kRowTiles][2], Token token) {
  const int position = item.position, tile = position / S::page_tokens, own = column.position / S::page_tokens;
  // of a tile a column sees the packed form if it lies before its own, the raw form if it is its own
  const int end = item.flags & kItemRaw ? (own == tile ? column.position + 1 : 0)
                                        : (tile < own ? (tile + 1) * S::page_tokens : 0);
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = position + token(t, h);
      if (at < column.low || at >= end) y[t][h] = -INFINITY;
    }
}

template <int kRowTiles>
__device__ inline void soft_cap(float cap, float inverse, float (&y)[kRowTiles][2]) {
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h)  // inverse: 2 log2(e) / cap; tanh x = 1 - 2 / (e^2x + 1)
      y[t][h] = cap - cap * __fdividef(2.0f, exp2_fast(y[t][h] * inverse) + 1.0f);
}

// What a warp has of its list, in order; of the segment that it is in, from `base` on.
template <class S>
class Pieces {
 public:
  __device__ Pieces(const AttendParameters& p, const RoomOf<S>& room, int warp, int rank, int lane)
      : p_(p), room_(room), pieces_(room->pieces[warp]), warp_(warp), rank_(rank), lane_(lane) {}

  __device__ void take(FullState<S::head_dim>& state, const Item& item) {
    StoredState<S::head_dim>* free = &room_.state(warp_, count_);
    if (item.flags & kItemRaw) exchange_channels<S>(state, *free, lane_);
    int rank = item.rank;
#pragma unroll 1
    while (count_ > base_ && rank < item.next && pieces_[count_ - 1].rank > rank) {
      rank = pieces_[--count_].rank;
      free = &room_.state(warp_, count_);
      FullState<S::head_dim> earlier;
      load_state(earlier, free->slices, lane_);
      fold_behind(earlier, state);
    }
    __syncwarp();
    store_state(state, free->slices, lane_);
    __syncwarp();
    if (rank == kRankBegins && item.next == kRankEnds) {
      finish<S>(p_, Target::of(p_.plan.blocks[item.block]), item.head, rank_, *free, lane_);
      return;
    }
    if (lane_ == 0)
      pieces_[count_] = {item.block, static_cast<int16_t>(item.head), static_cast<int8_t>(rank),
                         static_cast<int8_t>(item.next)};
    ++count_;
    __syncwarp();
    if (item.next == kRankEnds) base_ = count_;
  }
  __device__ int count() const { return count_; }

 private:
  const AttendParameters& p_;
  const RoomOf<S>& room_;
  Piece* pieces_;
  int warp_, rank_, lane_, count_ = 0, base_ = 0;
};

template <class S>
__device__ void compute(const AttendParameters& p, const RoomOf<S>& room, int warp, int lane) {
  const int team = warp / p.in.team_warps, rank = warp % p.in.team_warps;
  Share list{};
  Target first{};  // read before the wait: only what the kernel before writes must be read behind it
  if (team < p.in.teams) list = share_of(p, static_cast<int>(blockIdx.x) * p.in.teams + team, 1);
  if (list.steps() > 0) first = Target::of(p.plan.blocks[list.begin.block]);
  // Once for nothing, while there is nothing else to do: code that runs once is fetched longer than it runs.
  if (list.steps() > 0) prepare_queries<S>(p, room, first, list.begin.head, rank, warp, lane);
  wait_for_previous();
  let_next_start();
  if (list.steps() > 0) prepare_queries<S>(p, room, first, list.begin.head, rank, warp, lane);
  const int steps = list.steps(), key_base = team * p.in.key_depth, value_base = team * p.in.value_depth;
  const float* queries = room.queries(warp);
  const QueryColumn* columns = room->columns[warp];
  FullState<S::head_dim> state;
  Pieces<S> pieces(p, room, warp, rank, lane);
  int block = list.begin.block, head = list.begin.head, key = 0, value = 0;
  uint32_t key_parity = 0, value_parity = 0;
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    const uint8_t *keys = room.keys(key_base + key), *values = room.values(value_base + value);
    Barrier *keys_empty = &room->keys_empty[key_base + key], *values_full = &room->values_full[value_base + value];
    wait(&room->keys_full[key_base + key], key_parity);
    const Item item = room->items[key_base + key];
    if (item.block != block || item.head != head) {
      block = item.block, head = item.head;
      prepare_queries<S>(p, room, Target::of(p.plan.blocks[block]), head, rank, warp, lane);
    }
    if (item.flags & kItemFirst) state.clear();
    if ((item.flags & kItemRaw) == 0) {
      float y[S::page_tokens / 16][2];
      packed_scores<S>(keys, queries, lane, y);
      if (p.cap > 0) soft_cap(p.cap, p.cap_inverse, y);
      if (item.flags & kItemEdge)
        hide<S>(columns[lane & 3], item, y, [&](int t, int h) { return 16 * t + 2 * (lane >> 2) + h; });
      arrive(keys_empty);
      wait(values_full, value_parity);
      packed_outputs<S>(values - RoomOf<S>::key_part, y, lane, state);
    } else {
      float y[kRawTiles<S>][2];
      raw_scores<S>(keys, queries, columns, lane, y);
      if (p.cap > 0) soft_cap(p.cap, p.cap_inverse, y);
      hide<S>(columns[lane & 3], item, y, [&](int t, int h) { return 16 * t + (lane >> 2) + 8 * h; });
      arrive(keys_empty);
      wait(values_full, value_parity);
      raw_outputs<S>(values, y, lane, state);
    }
    arrive(&room->values_empty[value_base + value]);
    if (++key == p.in.key_depth) key = 0, key_parity ^= 1;
    if (++value == p.in.value_depth) value = 0, value_parity ^= 1;
    if (item.flags & kItemLast) pieces.take(state, item);
  }
  if (lane == 0) room->counts[warp] = pieces.count();
}

}  // namespace kvarn::cuda
