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

// What a warp has of its list, in order.
template <class S>
class Collector {
 public:
  __device__ Collector(const AttendParameters& p, const RoomOf<S>& room, int warp, int rank, int lane)
      : p_(p), room_(room), pieces_(room->pieces[warp]), warp_(warp), rank_(rank), lane_(lane) {}

  __device__ void take(FullState<S::head_dim>& state, const Item& item) {
    StoredState<S::head_dim>* free = &room_.state(warp_, has_.count);
    if (item.flags & kItemRaw) exchange_channels<S>(state, *free, lane_);
    int rank = item.rank;
#pragma unroll 1
    while (has_.count > has_.last_segment && rank < item.next && pieces_[has_.count - 1].rank > rank) {
      rank = pieces_[--has_.count].rank;
      free = &room_.state(warp_, has_.count);
      FullState<S::head_dim> earlier;
      load_state(earlier, free->slices, lane_);
      fold_behind(earlier, state);
    }
    __syncwarp();
    store_state(state, free->slices, lane_);
    __syncwarp();
    if (rank == kRankBegins && item.next == kRankEnds) {
      finish<S>(p_, Target::of(p_.plan.blocks[item.block]), item.head, rank_, *free, lane_);
      if (has_.first_segment < 0) has_.first_segment = 0;
      return;
    }
    if (lane_ == 0)
      pieces_[has_.count] = {reinterpret_cast<uint8_t*>(free), static_cast<int16_t>(rank), static_cast<int16_t>(item.next)};
    ++has_.count;
    __syncwarp();
    if (item.next == kRankEnds) {
      has_.last_segment = has_.count;
      if (has_.first_segment < 0) has_.first_segment = has_.count;
    }
  }
  __device__ Pieces has() const { return has_; }

 private:
  const AttendParameters& p_;
  const RoomOf<S>& room_;
  Piece* pieces_;
  int warp_, rank_, lane_;
  Pieces has_{0, 0, -1};
};

template <class S>
__device__ void compute(const AttendParameters& p, const RoomOf<S>& room, int warp, int lane) {
  const int team = warp / p.in.team_warps, rank = warp % p.in.team_warps;
  Share list{};
  Target first{};  // read before the wait: only what the kernel before writes must be read behind it
  if (team < p.in.teams) list = share_of(p, static_cast<int>(blockIdx.x) * p.in.teams + team, 1);
  if (list.steps() > 0) first = Target::of(p.plan.blocks[list.begin.block]);
  wait_for_previous();
  let_next_start();
  if (list.steps() > 0) prepare_queries<S>(p, room, first, list.begin.head, rank, warp, lane);
  const int steps = list.steps(), key_base = team * p.in.key_depth, value_base = team * p.in.value_depth;
  const float* queries = room.queries(warp);
  const QueryColumn* columns = room->columns[warp];
  FullState<S::head_dim> state;
  Collector<S> collector(p, room, warp, rank, lane);
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
    if (item.flags & kItemLast) collector.take(state, item);
  }
  if (lane == 0) room->counts[warp] = collector.has();
}

}  // namespace kvarn::cuda
