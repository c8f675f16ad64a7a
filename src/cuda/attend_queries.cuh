// SPDX-License-Identifier: Apache-2.0
// The query warp: rotates and scales the queries of the CTA's segments, ahead of those who need them.
#pragma once

#include "cuda/attend_room.cuh"
#include "cuda/attend_share.cuh"
#include "cuda/device.cuh"

namespace kvarn::cuda {

// The rotation of one vector over a warp: element 32 k + lane.
template <int kHeadDim>
__device__ inline void rotate_over_warp(float (&x)[kHeadDim / 32], int lane) {
#pragma unroll 1
  for (int bit = 1; bit < 32; bit *= 2)
#pragma unroll
    for (float& y : x) {
      const float other = __shfl_xor_sync(~0u, y, bit);
      y = lane & bit ? other - y : y + other;
    }
  constexpr int kFirst = kHeadDim == 96 ? 64 : kHeadDim;  // 96 = 64 + 32 are rotated apart
#pragma unroll
  for (int bit = 1; bit < kFirst / 32; bit *= 2)
#pragma unroll
    for (int k = 0; k < kFirst / 32; ++k)
      if ((k & bit) == 0) {
        const float a = x[k], b = x[k + bit];
        x[k] = a + b;
        x[k + bit] = a - b;
      }
#pragma unroll
  for (int k = 0; k < kHeadDim / 32; ++k) {
    const int block = 32 * k < kFirst ? kFirst : kHeadDim - kFirst;
    x[k] *= block == 256 ? 0.0625f : block == 128 ? 0.0883883461f : block == 64 ? 0.125f : 0.176776692f;
  }
}

// to[c][32 k + lane] = element 32 k + lane of column first + c, not rotated yet. All loads are in flight at once: one after
// the other they took 7 us.
template <class S, class Bits>
__device__ inline void load_queries(const AttendParameters& p, const BlockPlan& b, int head, int first, int lane,
                                    float* to) {
  constexpr int kEach = S::head_dim / 32;
  Bits bits[kWarpColumns][kEach];
#pragma unroll
  for (int c = 0; c < kWarpColumns; ++c) {
    const int column = b.first_column + min(first + c, b.columns - 1);
    const Bits* from = static_cast<const Bits*>(p.q.data) + (b.row + column / p.group) * p.q.token_stride +
                       (head * p.group + column % p.group) * p.q.head_stride + lane;
#pragma unroll
    for (int k = 0; k < kEach; ++k) bits[c][k] = from[32 * k];
  }
#pragma unroll
  for (int c = 0; c < kWarpColumns; ++c)
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      float x;
      if constexpr (sizeof(Bits) == 4)
        x = __uint_as_float(bits[c][k]);
      else
        x = p.q.dtype == KVARN_FLOAT16 ? __half2float(__ushort_as_half(bits[c][k]))
                                       : __uint_as_float(static_cast<uint32_t>(bits[c][k]) << 16);
      to[c * S::head_dim + 32 * k + lane] = first + c < b.columns ? x : 0;
    }
}

// Of every segment of the share, the columns of each warp of a team.
template <class S>
__device__ void prepare_queries(const AttendParameters& p, const Cut& cut, Room<S>& room, int lane) {
  if (cut.units == 0) return;
  Place at;
  at.begin(p, cut);
  int slot = 0;
  uint32_t parity = 1;  // the first round finds empty slots
#pragma unroll 1
  for (bool more = true; more;) {
    wait(&room.queries_empty[slot], parity);
    const BlockPlan b = p.plan.blocks[at.block];
#pragma unroll 1
    for (int warp = 0; warp < p.team_warps; ++warp) {
      const int first = kWarpColumns * warp;
      float* to = room.queries(p, slot, warp);
      if (p.q.dtype == KVARN_FLOAT32)
        load_queries<S, uint32_t>(p, b, at.head, first, lane, to);
      else
        load_queries<S, uint16_t>(p, b, at.head, first, lane, to);
      // One column after the other, from the lane's own words: straight code for all would take longer to fetch than to run.
#pragma unroll 1
      for (int c = 0; c < kWarpColumns; ++c, to += S::head_dim) {
        float x[S::head_dim / 32], largest = 0;
#pragma unroll
        for (int k = 0; k < S::head_dim / 32; ++k) x[k] = to[32 * k + lane];
        rotate_over_warp<S::head_dim>(x, lane);
#pragma unroll
        for (int k = 0; k < S::head_dim / 32; ++k) {
          x[k] *= p.factor;
          largest = fmaxf(largest, fabsf(x[k]));
          to[32 * k + lane] = x[k];
        }
#pragma unroll 1
        for (int bit = 1; bit < 32; bit *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bit));
        // The power of two above, within what has an inverse.
        const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 64u), 190u) + 1;
        const int position = b.start + (b.first_column + first + c) / p.group;
        if (lane == 0)
          room.columns[(slot * p.team_warps + warp) * kWarpColumns + c] = {
              __uint_as_float((254 - exponent) << 23), __uint_as_float(exponent << 23), position,
              p.window > 0 ? position - p.window + 1 : 0};
      }
    }
    arrive(&room.queries_full[slot]);
    if (++slot == p.teams) slot = 0, parity ^= 1;
    more = at.advance(p, min(at.units - at.unit, cut.units - at.number), cut.units);
  }
}

// Rows that no request of the step owns become zeros.
template <class S>
__device__ void clear_absent(const AttendParameters& p, int lane) {
  const int query_heads = p.heads * p.group;
#pragma unroll 1
  for (int r = static_cast<int>(blockIdx.x); r <= p.requests; r += static_cast<int>(gridDim.x)) {
    if (r < p.requests && p.plan.requests[r].queries > 0) continue;
    const int first = max(p.query_starts[r], 0), end = r < p.requests ? p.query_starts[r + 1] : p.tokens;
#pragma unroll 1
    for (int row = first; row < min(end, p.tokens); ++row)
#pragma unroll 1
      for (int h = 0; h < query_heads; ++h)
#pragma unroll 1
        for (int d = lane; d < S::head_dim; d += 32)
          store_element(0.0f, p.out.data, p.out.dtype, row * p.out.token_stride + h * p.out.head_stride + d);
  }
}

}  // namespace kvarn::cuda
