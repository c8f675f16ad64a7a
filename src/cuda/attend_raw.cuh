// SPDX-License-Identifier: Apache-2.0
// A step of raw tokens of the own tile and the four columns of a warp: f16 products of which the right operand is
// split into two f16 parts, in the even and the odd column of an MMA, so that q and p lose nothing that counts.
//
// The state's channels differ from a packed piece's: lane 4 g + i holds 16 T + g and 16 T + g + 8.
#pragma once

#include "cuda/attend_packed.cuh"
#include "cuda/plan.hpp"

namespace kvarn::cuda {

// Of a column: the power of two that brings its query to 1 or below, and its inverse; its token's position, and the first
// token that it sees.
struct alignas(16) QueryColumn {
  float down, up;
  int32_t position, low;
};

template <class S>
inline constexpr int kRawRowBytes = raw_row_bytes(S::head_dim);

__device__ inline uint32_t pack_halves(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &h, 4);
  return bits;
}
// The f16 nearest to x, or what is left of x after it.
__device__ inline float split(float x, bool rest) {
  const float high = __half2float(__float2half_rn(x));
  return rest ? x - high : high;
}

template <class S>
inline constexpr int kRawTiles = raw_step(S::layout) / 16;

// y[t][h]: log2 score of token 16 t + g + 8 h. `queries` f32 [4][D]; columns: see QueryColumn.
template <class S>
__device__ inline void raw_scores(const uint8_t* keys, const float* queries, const QueryColumn* columns, int lane,
                                  float (&y)[kRawTiles<S>][2]) {
  const int g = lane >> 2, i = lane & 3, matrix = lane >> 3;
  const uint8_t* row = keys + (lane % 8 + 8 * (matrix & 1)) * kRawRowBytes<S> + 16 * (matrix >> 1);
  const float* q = queries + (g >> 1) * S::head_dim + 2 * i;
  const float s = columns[g >> 1].down;
  const bool rest = g & 1;
  float c[kRawTiles<S>][4] = {};
#pragma unroll 4
  for (int k = 0; k < S::head_dim / 16; ++k) {
    const float2 low = load_as<float2>(q + 16 * k), high = load_as<float2>(q + 16 * k + 8);
    const uint32_t b0 = pack_halves(split(low.x * s, rest), split(low.y * s, rest)),
                   b1 = pack_halves(split(high.x * s, rest), split(high.y * s, rest));
#pragma unroll
    for (int t = 0; t < kRawTiles<S>; ++t) {
      uint32_t a[4];
      load_matrices<false>(a, row + 16 * t * kRawRowBytes<S> + 32 * k);
      mma_halves(c[t], a, b0, b1);
    }
  }
#pragma unroll
  for (int t = 0; t < kRawTiles<S>; ++t) {
    y[t][0] = (c[t][0] + c[t][1]) * columns[i].up;
    y[t][1] = (c[t][2] + c[t][3]) * columns[i].up;
  }
}

template <class S>
__device__ inline void raw_outputs(const uint8_t* values, float (&y)[kRawTiles<S>][2], int lane,
                                   FullState<S::head_dim>& state) {
  const int matrix = lane >> 3;
  const uint8_t* row = values + (lane % 8 + 8 * (matrix >> 1)) * kRawRowBytes<S> + 16 * (matrix & 1);
  float m, l;
  softmax(y, m, l);
  const float b = begin_step(state, m, l);
  uint32_t operand[kRawTiles<S>][2];
#pragma unroll
  for (int t = 0; t < kRawTiles<S>; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) operand[t][h] = transpose(pack_halves(y[t][h], split(y[t][h], true)));
#pragma unroll
  for (int d = 0; d < S::head_dim / 16; ++d) {
    float c[4] = {};
#pragma unroll
    for (int t = 0; t < kRawTiles<S>; ++t) {
      uint32_t a[4];
      load_matrices<true>(a, row + 16 * t * kRawRowBytes<S> + 32 * d);
      mma_halves(c, a, operand[t][0], operand[t][1]);
    }
    state.out[2 * d] = __fmaf_rn(c[0] + c[1], b, state.out[2 * d]);
    state.out[2 * d + 1] = __fmaf_rn(c[2] + c[3], b, state.out[2 * d + 1]);
  }
}

// Through memory to the channels of a packed piece.
template <class S>
__device__ inline void exchange_channels(FullState<S::head_dim>& s, StoredState<S::head_dim>& room, int lane) {
  const int g = lane >> 2, i = lane & 3;
  const float m = s.m, l = s.l;
#pragma unroll
  for (int t = 0; t < S::head_dim / 16; ++t) {
    room.at(16 * t + g, i) = s.out[2 * t];
    room.at(16 * t + g + 8, i) = s.out[2 * t + 1];
  }
  __syncwarp();
  load_state(s, room.slices, lane);
  s.m = m, s.l = l;
  __syncwarp();
}

}  // namespace kvarn::cuda
