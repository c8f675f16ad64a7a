// SPDX-License-Identifier: Apache-2.0
// A computing warp: the steps of its team's list, against its own columns, a quad of them or two. Steps that are
// chained stay in registers; what is complete is added to what the warp has before it, as far as the order allows, and
// a segment that lies in the list from its beginning to its end is finished here. The rest is left to the end of the
// CTA (attend_merge.cuh).
#pragma once

#include "cuda/attend_finish.cuh"
#include "cuda/attend_order.cuh"
#include "cuda/attend_packed.cuh"
#include "cuda/attend_queries.cuh"

namespace kvarn::cuda {

// Which tokens the lane's column sees; only steps at an edge need it.
template <class S, int kRowTiles, class Token>
__device__ inline void hide(const QueryColumn& column, const Item& item, float (&y)[kRowTiles][2], Token token) {
  const int position = item.position, tile = position / S::page_tokens, own = column.position / S::page_tokens;
  // of a tile a column sees the packed form if it lies before its own, the raw form if it is its own
  const int end =
      item.flags & kItemRaw ? (own == tile ? column.position + 1 : 0) : (tile < own ? (tile + 1) * S::page_tokens : 0);
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

// The scores of a step as they count: capped, without those of tokens that the column does not see.
template <class S, int kRowTiles, class Token>
__device__ inline void amend(const AttendParameters& p, const QueryColumn& column, const Item& item,
                             float (&y)[kRowTiles][2], Token token) {
  if (p.cap > 0) soft_cap(p.cap, p.cap_inverse, y);
  if (item.flags & kItemEdge) hide<S>(column, item, y, token);
}

// Those of a packed tile, which seldom change. Not inlined, so that it does not lie in the middle of the code that
// every tile needs; by value, so that scores stay in registers.
template <class S>
struct PackedScores {
  float y[S::page_tokens / 16][2];
};
template <class S>
__device__ __noinline__ PackedScores<S> amended(const AttendParameters& p, const QueryColumn& column, Item item,
                                                int lane, PackedScores<S> scores) {
  amend<S>(p, column, item, scores.y, [&](int t, int h) { return 16 * t + 2 * (lane >> 2) + h; });
  return scores;
}

// What a warp has of its list, in order. `quad` of the CTA and `rank` of the team are its first one.
template <class S, int kQuads>
class Collector {
 public:
  __device__ Collector(const AttendParameters& p, const RoomOf<S>& room, int warp, int rank, int lane)
      : p_(p), room_(room), pieces_(room.pieces(warp)), quad_(warp * kQuads), rank_(rank), lane_(lane) {}

  __device__ void take(FullState<S::head_dim> (&state)[kQuads], const Item& item) {
    int at = has_.count, rank = item.rank;
    if (item.flags & kItemRaw) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) exchange_channels<S>(state[j], room_.state(quad_ + j, at), lane_);
    }
#pragma unroll 1
    while (at > has_.last_segment && rank < item.next && pieces_[at - 1].rank > rank) {
      rank = pieces_[--at].rank;
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        FullState<S::head_dim> earlier;
        load_state(earlier, room_.state(quad_ + j, at).slices, lane_);
        fold(earlier, state[j], state[j]);
      }
    }
    has_.count = at;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kQuads; ++j) store_state(state[j], room_.state(quad_ + j, at).slices, lane_);
    __syncwarp();
    if (rank == kRankBegins && item.next == kRankEnds) {
#pragma unroll 1
      for (int j = 0; j < kQuads; ++j)
        finish_quad<S>(room_->parameters, Target::of(p_.plan.blocks[item.block]), item.head, rank_ + j,
                       room_.state(quad_ + j, at), lane_);
      if (has_.first_segment < 0) has_.first_segment = 0;
      return;
    }
    if (lane_ == 0) pieces_[at] = {room_.place(quad_, at), static_cast<int16_t>(rank), static_cast<int16_t>(item.next)};
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
  int quad_, rank_, lane_;
  Pieces has_{0, 0, -1};
};

template <class S, int kQuads>
__device__ void compute(const AttendParameters& p, const RoomOf<S>& room, int warp, int lane) {
  // Every fourth warp is of the same quarter of the multiprocessor, and a team's last warp is idle in narrow blocks:
  // the warps of a team take turns, so that the idle ones are of different quarters. Warps behind the last team have
  // nothing to do.
  const int team = warp / p.in.team_warps, turn = team + team * p.in.team_warps / 4;
  if (team < p.in.teams) warp = team * p.in.team_warps + (warp + turn) % p.in.team_warps;
  const int quad = warp * kQuads, rank = warp % p.in.team_warps * kQuads;
  Share list{};
  Target first{};  // read before the wait: only what the kernel before writes must be read behind it
  if (team < p.in.teams) list = share_of(p, static_cast<int>(blockIdx.x) * p.in.teams + team, 1);
  if (list.steps() > 0) first = Target::of(p.plan.blocks[list.begin.block]);
  wait_for_previous();
  let_next_start();
  // A warp whose quads have no columns of the block only keeps pace.
  bool idle = kQuadColumns * rank >= first.columns;
  if (list.steps() > 0) prepare_queries<S, kQuads>(room.apart(), first, list.begin.head, rank, quad, lane);
  const int steps = list.steps();
  const float* queries = room.queries(quad);
  const QueryColumn* columns = room->columns[quad];
  FullState<S::head_dim> state[kQuads];
  const auto clear = [&] {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) state[j].clear();
  };
  clear();
  Collector<S, kQuads> collector(p, room, warp, rank, lane);
  int block = list.begin.block, head = list.begin.head;
  Slots key(room->keys_full, team * p.in.key_depth, 0), value(room->values_full, team * p.in.value_depth, 0);
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    const uint8_t *keys = room.keys(key.next), *values = room.values(value.next);
    wait(key.full, key.parity);
    const Item item = room->items[key.next];
    if (item.block != block || item.head != head) {
      block = item.block, head = item.head;
      const Target target = Target::of(p.plan.blocks[block]);
      idle = kQuadColumns * rank >= target.columns;
      prepare_queries<S, kQuads>(room.apart(), target, head, rank, quad, lane);
    }
    if (idle) {
      arrive(key.empty());
      wait(value.full, value.parity);
    } else if ((item.flags & kItemRaw) == 0) {
      float y[kQuads][S::page_tokens / 16][2];
      packed_scores<S, kQuads>(keys, queries, columns, lane, y);
      if (p.cap > 0 || (item.flags & kItemEdge)) {
#pragma unroll
        for (int j = 0; j < kQuads; ++j) {
          PackedScores<S> scores;
          memcpy(&scores, y[j], sizeof scores);
          scores = amended<S>(room->parameters, columns[kQuadColumns * j + (lane & 3)], item, lane, scores);
          memcpy(y[j], &scores, sizeof scores);
        }
      }
      arrive(key.empty());
      wait(value.full, value.parity);
      packed_outputs<S, kQuads>(values - RoomOf<S>::key_part, y, lane, state);
    } else {
      float y[kQuads][kRawTiles<S>][2];
      raw_scores<S, kQuads>(keys, queries, columns, lane, y);
#pragma unroll
      for (int j = 0; j < kQuads; ++j)
        amend<S>(p, columns[kQuadColumns * j + (lane & 3)], item, y[j],
                 [&](int t, int h) { return 16 * t + (lane >> 2) + 8 * h; });
      arrive(key.empty());
      wait(value.full, value.parity);
      raw_outputs<S, kQuads>(values, y, lane, state);
    }
    arrive(value.empty());
    key.advance(p.in.key_depth);
    value.advance(p.in.value_depth);
    if (item.flags & kItemLast) {
      collector.take(state, item);
      clear();
    }
  }
  if (lane == 0) room->counts[warp] = collector.has();
}

}  // namespace kvarn::cuda
