// SPDX-License-Identifier: Apache-2.0
// A computing warp: the items of its team, against its own four columns. The loop holds little else: its instructions do
// not fit the innermost cache, so that every jump over others waits for more.
#pragma once

#include "cuda/attend_room.cuh"
#include "cuda/attend_share.cuh"

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

template <class S>
__device__ void compute(const AttendParameters& p, const Cut& cut, Room<S>& room, int warp, int lane) {
  const int team = warp / p.team_warps, rank = warp % p.team_warps;
  if (team >= p.teams) return;
  const Schedule schedule(p, cut);
  const int items = schedule.items(), key_base = team * p.key_depth, value_base = team * p.value_depth;
  const uint8_t* key_slots = room.slots(p) + key_base * SlotBytes<S>::keys;
  const uint8_t* value_slots =
      room.slots(p) + p.teams * p.key_depth * SlotBytes<S>::keys + value_base * SlotBytes<S>::values;
  State<S::head_dim> state;
  const float* queries = nullptr;
  const QueryColumn* columns = nullptr;
  int segment = -1, key = 0, value = 0;
  uint32_t key_parity = 0, value_parity = 0;
#pragma unroll 1
  for (int i = team; i < items; i += p.teams) {
    const uint8_t *keys = key_slots + key * SlotBytes<S>::keys, *values = value_slots + value * SlotBytes<S>::values;
    Barrier *keys_empty = &room.keys_empty[key_base + key], *values_full = &room.values_full[value_base + value];
    wait(&room.keys_full[key_base + key], key_parity);
    const Item& item = room.items[key_base + key];
    const uint32_t flags = item.flags;
    if (item.segment != segment) {
      segment = item.segment;
      const int at = segment % p.teams;
      wait(&room.queries_full[at], segment / p.teams & 1);
      queries = room.queries(p, at, rank);
      columns = room.columns + (at * p.team_warps + rank) * kWarpColumns;
    }
    if (flags & kItemFirst) state.clear();
    if ((flags & (kItemRaw | kItemEmpty)) == 0) {
      float y[S::page_tokens / 16][2];
      packed_scores<S>(keys, queries, lane, y);
      if (p.cap > 0) soft_cap(p.cap, p.cap_inverse, y);
      if (flags & kItemEdge)
        hide<S>(columns[lane & 3], item, y, [&](int t, int h) { return 16 * t + 2 * (lane >> 2) + h; });
      arrive(keys_empty);
      wait(values_full, value_parity);
      packed_outputs<S>(values - SlotBytes<S>::key_part, y, lane, state);
    } else if ((flags & kItemEmpty) == 0) {
      float y[1][2];
      raw_scores<S>(keys, queries, columns, lane, y);
      if (p.cap > 0) soft_cap(p.cap, p.cap_inverse, y);
      hide<S>(columns[lane & 3], item, y, [&](int, int h) { return (lane >> 2) + 8 * h; });
      arrive(keys_empty);
      wait(values_full, value_parity);
      raw_outputs<S>(values, y, lane, state);
    } else {
      arrive(keys_empty);
      wait(values_full, value_parity);
    }
    arrive(&room.values_empty[value_base + value]);
    if (++key == p.key_depth) key = 0, key_parity ^= 1;
    if (++value == p.value_depth) value = 0, value_parity ^= 1;

    if (flags & kItemLast) {
      const int run = schedule.run_of(i), at = run % p.results;
      wait(&room.results_empty[at], (run / p.results & 1) ^ 1);
      // A run's steps are all packed or all raw, and only the last ones may be missing.
      if (flags & kItemRaw)
        store_raw_state<S>(state, room.result(p, at, rank), lane);
      else
        room.result(p, at, rank).store(state, lane);
      arrive(&room.results_full[at]);
    }
  }
}

}  // namespace kvarn::cuda
