// SPDX-License-Identifier: Apache-2.0
// The queries of a segment, rotated, scaled and brought below 1, for the columns of a warp.
#pragma once

#include "cuda/attend_room.cuh"
#include "cuda/device.cuh"

namespace kvarn::cuda {

// The rotation of kCount vectors over a warp: element 32 k + lane. A loop of few instructions, which wait for nothing
// but each other: code that runs once is fetched longer than it runs.
template <int kHeadDim, int kCount>
__device__ inline void rotate_over_warp(float (&x)[kCount][kHeadDim / 32], int lane) {
#pragma unroll 1
  for (int bit = 1; bit < 32; bit *= 2)
#pragma unroll
    for (int c = 0; c < kCount; ++c)
#pragma unroll
      for (float& y : x[c]) {
        const float other = __shfl_xor_sync(~0u, y, bit);
        y = lane & bit ? other - y : y + other;
      }
  constexpr int kFirst = kHeadDim == 96 ? 64 : kHeadDim;  // 96 = 64 + 32 are rotated apart
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int bit = 1; bit < kFirst / 32; bit *= 2)
#pragma unroll
      for (int k = 0; k < kFirst / 32; ++k)
        if ((k & bit) == 0) {
          const float p = x[c][k], q = x[c][k + bit];
          x[c][k] = p + q;
          x[c][k + bit] = p - q;
        }
#pragma unroll
    for (int k = 0; k < kHeadDim / 32; ++k) {
      const int block = 32 * k < kFirst ? kFirst : kHeadDim - kFirst;
      x[c][k] *= block == 256 ? 0.0625f : block == 128 ? 0.0883883461f : block == 64 ? 0.125f : 0.176776692f;
    }
  }
}

// Whose column `local` of a block is: which row of the step, and query head.
struct Place {
  int row, query_head;
  __device__ Place(const AttendParameters& p, const Target& b, int head, int local) {
    const unsigned column = b.first_column + local, group = p.group, rows = column / group;
    row = static_cast<int>(b.row + rows), query_head = static_cast<int>(head * group + column - rows * group);
  }
  template <class Rows>
  __device__ int64_t in(const Rows& rows) const {
    return row * rows.token_stride + query_head * rows.head_stride;
  }
};

// Element 32 k + lane of kColumns columns, not rotated yet; `mine` is where the one of lane % kColumns begins. All
// loads are in flight at once.
template <class S, class Bits, int kColumns>
__device__ inline void load_queries(const kvarn_rows& q, int64_t mine, int lane,
                                    float (&x)[kColumns][S::head_dim / 32]) {
  constexpr int kEach = S::head_dim / 32;
  Bits bits[kColumns][kEach];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const Bits* from = static_cast<const Bits*>(q.data) + __shfl_sync(~0u, mine, c) + lane;
#pragma unroll
    for (int k = 0; k < kEach; ++k) bits[c][k] = __ldcg(from + 32 * k);
  }
  const bool half = q.dtype == KVARN_FLOAT16;
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if constexpr (sizeof(Bits) == 4)
        x[c][k] = __uint_as_float(bits[c][k]);
      else
        x[c][k] = half ? __half2float(__ushort_as_half(bits[c][k]))
                       : __uint_as_float(static_cast<uint32_t>(bits[c][k]) << 16);
    }
}

// f32 queries, which models seldom have: apart, so that their code does not lie in the middle of the others'.
template <class S, int kColumns>
struct Loaded {
  float x[kColumns][S::head_dim / 32];
};
template <class S, int kColumns>
__device__ __noinline__ Loaded<S, kColumns> load_floats(const kvarn_rows& q, int64_t mine, int lane) {
  Loaded<S, kColumns> loaded;
  load_queries<S, uint32_t>(q, mine, lane, loaded.x);
  return loaded;
}

// For the kQuads quads of a warp, the first of which is `rank` of its team and `quad` of the CTA.
template <class S, int kQuads>
__device__ __noinline__ void prepare_queries(RoomOf<S> room, Target b, int head, int rank, int quad, int lane) {
  const AttendParameters& p = room.p;
  constexpr int kColumns = kQuadColumns * kQuads;
  // A lane has a column, one that there is: of others the last.
  const Place place(p, b, head, min(kQuadColumns * rank + lane % kColumns, b.columns - 1));
  const int64_t mine = place.in(p.q);
  float x[kColumns][S::head_dim / 32], largest[kColumns] = {};
  if (p.q.dtype == KVARN_FLOAT32) {
    const Loaded<S, kColumns> loaded = load_floats<S, kColumns>(p.q, mine, lane);
    memcpy(x, loaded.x, sizeof x);
  } else {
    load_queries<S, uint16_t>(p.q, mine, lane, x);
  }
  if (p.balance != nullptr) {
#pragma unroll
    for (int k = 0; k < S::head_dim / 32; ++k) {
      const float by = __ldg(p.balance + head * S::head_dim + 32 * k + lane);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[c][k] *= by;
    }
  }
  rotate_over_warp<S::head_dim>(x, lane);
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (float& y : x[c]) {
      y *= p.factor;
      largest[c] = fmaxf(largest[c], fabsf(y));
    }
#pragma unroll 1
  for (int bit = 1; bit < 32; bit *= 2)
#pragma unroll
    for (float& y : largest) y = fmaxf(y, __shfl_xor_sync(~0u, y, bit));
  float* to = room.queries(quad) + lane;
  __syncwarp();  // what was there has been read
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const float down = power_between(254 - exponent_above(largest[c]));
#pragma unroll
    for (int k = 0; k < S::head_dim / 32; ++k) to[c * query_stride(S::head_dim) + 32 * k] = x[c][k] * down;
  }
#pragma unroll
  for (int half = kColumns / 2; half > 0; half /= 2)  // largest[0]: of the lane's column
#pragma unroll
    for (int c = 0; c < half; ++c) largest[c] = lane & half ? largest[c + half] : largest[c];
  if (lane < kColumns) {
    const int position = b.start + place.row - b.row;
    room->columns[quad + lane / kQuadColumns][lane % kQuadColumns] = {
        power_between(exponent_above(largest[0])), position, p.window > 0 ? position - p.window + 1 : 0};
  }
  __syncwarp();
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
