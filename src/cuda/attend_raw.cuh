// SPDX-License-Identifier: Apache-2.0
// A step of raw tokens of the own tile and the columns of a warp: f16 products of which the right operand is split into
// two f16 parts, which lie as the limbs of a packed tile do, so that q and p lose nothing that counts.
//
// The state's channels differ from a packed piece's: lane 4 g + i holds 16 T + g and 16 T + g + 8.
#pragma once

#include "cuda/attend_softmax.cuh"
#include "cuda/plan.hpp"

namespace kvarn::cuda {

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

// Both parts' products of row h and quad j.
template <int kQuads>
__device__ inline float parts(const float (&c)[kQuads][4], int j, int h) {
  return kQuads == 1 ? c[0][2 * h] + c[0][2 * h + 1] : c[0][2 * h + j] + c[kQuads - 1][2 * h + j];
}

// y[j][t][h]: log2 score of token 16 t + g + 8 h and column i of quad j.
template <class S, int kQuads>
__device__ inline void raw_scores(const uint8_t* keys, const float* queries, const QueryColumn* columns, int lane,
                                  float (&y)[kQuads][kRawTiles<S>][2]) {
  const int g = lane >> 2, i = lane & 3, matrix = lane >> 3, column = query_column<kQuads>(g);
  const uint8_t* row = keys + (lane % 8 + 8 * (matrix & 1)) * kRawRowBytes<S> + 16 * (matrix >> 1);
  const float* q = queries + column * query_stride(S::head_dim) + 2 * i;
  float c[kRawTiles<S>][kQuads][4] = {};
#pragma unroll 4
  for (int k = 0; k < S::head_dim / 16; ++k) {
    const float2 low = load_as<float2>(q + 16 * k), high = load_as<float2>(q + 16 * k + 8);
    uint32_t right[kQuads][2];
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const bool rest = kQuads == 1 ? g & 1 : j == 1;
      right[j][0] = pack_halves(split(low.x, rest), split(low.y, rest));
      right[j][1] = pack_halves(split(high.x, rest), split(high.y, rest));
    }
#pragma unroll
    for (int t = 0; t < kRawTiles<S>; ++t) {
      uint32_t a[4];
      load_matrices<false>(a, row + 16 * t * kRawRowBytes<S> + 32 * k);
#pragma unroll
      for (int j = 0; j < kQuads; ++j) mma_halves(c[t][j], a, right[j][0], right[j][1]);
    }
  }
#pragma unroll
  for (int j = 0; j < kQuads; ++j)
#pragma unroll
    for (int t = 0; t < kRawTiles<S>; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) y[j][t][h] = parts(c[t], j, h) * columns[kQuadColumns * j + i].up;
}

template <class S, int kQuads>
__device__ inline void raw_outputs(const uint8_t* values, float (&y)[kQuads][kRawTiles<S>][2], int lane,
                                   FullState<S::head_dim> (&state)[kQuads]) {
  const int matrix = lane >> 3;
  const uint8_t* row = values + (lane % 8 + 8 * (matrix >> 1)) * kRawRowBytes<S> + 16 * (matrix & 1);
  float b[kQuads];
#pragma unroll
  for (int j = 0; j < kQuads; ++j) b[j] = begin_step(state[j], softmax(y[j]));
  uint32_t operand[kQuads][kRawTiles<S>][2];
#pragma unroll
  for (int t = 0; t < kRawTiles<S>; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float first = y[0][t][h];
      if constexpr (kQuads == 1) {
        operand[0][t][h] = transpose(pack_halves(first, split(first, true)));
      } else {
        const float second = y[1][t][h];
        operand[0][t][h] = transpose(pack_halves(first, second));
        operand[1][t][h] = transpose(pack_halves(split(first, true), split(second, true)));
      }
    }
#pragma unroll
  for (int d = 0; d < S::head_dim / 16; ++d) {
    float c[kQuads][4] = {};
#pragma unroll
    for (int t = 0; t < kRawTiles<S>; ++t) {
      uint32_t a[4];
      load_matrices<true>(a, row + 16 * t * kRawRowBytes<S> + 32 * d);
#pragma unroll
      for (int j = 0; j < kQuads; ++j) mma_halves(c[j], a, operand[j][t][0], operand[j][t][1]);
    }
#pragma unroll
    for (int j = 0; j < kQuads; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) state[j].out[2 * d + h] = __fmaf_rn(parts(c, j, h), b[j], state[j].out[2 * d + h]);
  }
}

// Through memory to the channels of a packed piece.
template <class S>
__device__ inline void exchange_channels(FullState<S::head_dim>& s, StoredState<S::head_dim>& room, int lane) {
  using Stored = StoredState<S::head_dim>;
  const int g = lane >> 2, i = lane & 3;
  const float m = s.m, l = s.l;
  float* first = &room.at(g, i);
#pragma unroll
  for (int t = 0; t < S::head_dim / 16; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) first[Stored::distance(16 * t + 8 * h)] = s.out[2 * t + h];
  __syncwarp();
  load_state(s, room.slices, lane);
  s.m = m, s.l = l;
  __syncwarp();
}

}  // namespace kvarn::cuda
