// SPDX-License-Identifier: Apache-2.0
// The end of a segment: sink, division by the sum of weights, inverse rotation, output.
#pragma once

#include "cuda/attend_queries.cuh"
#include "cuda/device.cuh"

namespace kvarn::cuda {

// The inverse rotation of the lane's column: channel 16 T + 2 g + h lies in element 2 T + h.
template <int kHeadDim>
__device__ inline void rotate_column(float (&x)[kHeadDim / 8], int lane) {
#pragma unroll
  for (int e = 0; e < kHeadDim / 8; e += 2) {  // bit 0 of the channel
    const float p = x[e], q = x[e + 1];
    x[e] = p + q;
    x[e + 1] = p - q;
  }
#pragma unroll 1
  for (int mask = 4; mask < 32; mask *= 2)  // bits 1, 2, 3 are g
#pragma unroll
    for (float& y : x) {
      const float other = __shfl_xor_sync(~0u, y, mask);
      y = lane & mask ? other - y : y + other;
    }
  constexpr int kFirst = kHeadDim == 96 ? 64 : kHeadDim;  // 96 = 64 + 32 are rotated apart
#pragma unroll
  for (int start = 0; start < kHeadDim; start += kFirst) {
    const int block = start == 0 ? kFirst : kHeadDim - kFirst;
#pragma unroll
    for (int bit = 1; bit < block / 16; bit *= 2)
#pragma unroll
      for (int t = 0; t < block / 16; ++t)
        if ((t & bit) == 0)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int e = 2 * (start / 16 + t) + h;
            const float a = x[e], b = x[e + 2 * bit];
            x[e] = a + b;
            x[e + 2 * bit] = a - b;
          }
    const float scale = block == 256 ? 0.0625f : block == 128 ? 0.0883883461f : block == 64 ? 0.125f : 0.176776692f;
#pragma unroll
    for (int e = 0; e < block / 8; ++e) x[start / 8 + e] *= scale;
    if (kFirst == kHeadDim) break;
  }
}

// x[e] to element first + channel(e) of the output. Where that is and its dtype are in shared memory, for all that the
// compiler knows behind every store anew: so they are read once.
template <int kCount, class Channel>
__device__ inline void store_channels(const kvarn_rows_out& out, int64_t first, const float (&x)[kCount],
                                      Channel channel) {
  const auto store = [&]<class T>(T* to, auto convert) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) to[channel(e)] = convert(x[e]);
  };
  void* data = out.data;
  if (out.dtype == KVARN_FLOAT16)
    store(static_cast<__half*>(data) + first, [](float y) { return __float2half_rn(y); });
  else if (out.dtype == KVARN_BFLOAT16)
    store(static_cast<__nv_bfloat16*>(data) + first, [](float y) { return __float2bfloat16_rn(y); });
  else
    store(static_cast<float*>(data) + first, [](float y) { return y; });
}

// What a column's sums are multiplied by: one over the sum of its weights, to which a sink adds one more logit.
__device__ inline float inverse_sum(const AttendParameters& p, float m, float l, int query_head) {
  float a = 1;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[query_head] * 1.44269504f, unit = fmaxf(ceilf(sink), kEmpty);
    const FoldFactors f = fold_factors(m, unit);
    a = f.a;
    l = fold_value(l, exp2_fast(sink - unit), f);
  }
  return a / l;
}

// A segment's result, all of it in `total`, to the rows of the columns of a team's quad `rank`, by the one warp that
// has it. Not inlined: code that is rarely used must not lie between code that is used all the time.
template <class S>
__device__ __noinline__ void finish_quad(const AttendParameters& p, Target b, int head, int rank,
                                         const StoredState<S::head_dim>& total, int lane) {
  const int g = lane >> 2, i = lane & 3, local = kQuadColumns * rank + i;
  if (kQuadColumns * rank >= b.columns) return;
  const Place place(p, b, head, min(local, b.columns - 1));
  FullState<S::head_dim> state;
  load_state(state, total.slices, lane);
  float(&x)[S::head_dim / 8] = state.out;
  const float inverse = inverse_sum(p, state.m, state.l, place.query_head);
#pragma unroll
  for (float& y : x) y *= inverse;
  rotate_column<S::head_dim>(x, lane);
  if (local >= b.columns) return;
  store_channels(p.out, place.in(p.out) + 2 * g, x, [](int e) { return 16 * (e / 2) + e % 2; });
}

// The same bits for one column, where warps share what everybody waits for.
template <class S>
__device__ __noinline__ void finish_column(const AttendParameters& p, Target b, int head, int local,
                                           StoredState<S::head_dim>& total, int lane) {
  const int i = local % kQuadColumns;
  const Place place(p, b, head, local);
  float x[1][S::head_dim / 32];
#pragma unroll
  for (int k = 0; k < S::head_dim / 32; ++k) x[0][k] = (&total.at(lane, i))[StoredState<S::head_dim>::distance(32 * k)];
  const float inverse = inverse_sum(p, total.slices[0].m[i], total.slices[0].l[i], place.query_head);
#pragma unroll
  for (float& y : x[0]) y *= inverse;
  rotate_over_warp<S::head_dim>(x, lane);
  store_channels(p.out, place.in(p.out) + lane, x[0], [](int k) { return 32 * k; });
}

}  // namespace kvarn::cuda
