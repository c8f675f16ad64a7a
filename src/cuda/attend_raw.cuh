// SPDX-License-Identifier: Apache-2.0
// Sixteen raw tokens of the own tile and the columns of a block, by one warp: f16 products of which the right operand is
// split into two f16 parts, in the even and the odd column of an MMA, so that q and p lose nothing that counts.
//
// The state's channels differ from a packed piece's: lane 4 g + i holds 16 T + g and 16 T + g + 8.
#pragma once

#include "cuda/attend_packed.cuh"

namespace kvarn::cuda {

inline constexpr int kRawStep = 16;  // tokens

// Rows in shared memory, 16 bytes apart beyond their length, so that 8 of them touch all banks.
template <class S>
inline constexpr int kRawRowBytes = 2 * S::head_dim + 16;

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

// y[nt][0][h]: log2 score of token g + 8 h. scales: per column, {2^-e, 2^e} with |q| 2^-e <= 1.
template <class S, int kTiles>
__device__ inline void raw_scores(const uint8_t* keys, const float* queries, const float2* scales, int lane,
                                  float (&y)[kTiles][1][2]) {
  const int g = lane >> 2, i = lane & 3, matrix = lane >> 3;
  const uint8_t* row = keys + (lane % 8 + 8 * (matrix & 1)) * kRawRowBytes<S> + 16 * (matrix >> 1);
  float c[kTiles][4] = {};
#pragma unroll
  for (int k = 0; k < S::head_dim / 16; ++k) {
    uint32_t a[4];
    load_matrices<false>(a, row + 32 * k);
#pragma unroll
    for (int nt = 0; nt < kTiles; ++nt) {
      const int column = 4 * nt + (g >> 1);
      const float* q = queries + column * S::head_dim + 16 * k + 2 * i;
      const float2 low = load_as<float2>(q), high = load_as<float2>(q + 8);
      const float s = scales[column].x;
      const bool rest = g & 1;
      mma_halves(c[nt], a, pack_halves(split(low.x * s, rest), split(low.y * s, rest)),
                 pack_halves(split(high.x * s, rest), split(high.y * s, rest)));
    }
  }
#pragma unroll
  for (int nt = 0; nt < kTiles; ++nt) {
    const float s = scales[4 * nt + i].y;
    y[nt][0][0] = (c[nt][0] + c[nt][1]) * s;
    y[nt][0][1] = (c[nt][2] + c[nt][3]) * s;
  }
}

template <class S, int kTiles>
__device__ inline void raw_outputs(const uint8_t* values, float (&y)[kTiles][1][2], int lane,
                                   State<S::head_dim, kTiles>& state) {
  const int matrix = lane >> 3;
  const uint8_t* row = values + (lane % 8 + 8 * (matrix >> 1)) * kRawRowBytes<S> + 16 * (matrix & 1);
  uint32_t operand[kTiles][2];
  float b[kTiles];
#pragma unroll
  for (int nt = 0; nt < kTiles; ++nt) {
    float m, l;
    softmax(y[nt], m, l);
    const FoldFactors f = fold_factors(state.m[nt], m);
    state.m[nt] = f.m;
    state.l[nt] = fold_value(state.l[nt], l, f);
    rescale(state, nt, f.a);
    b[nt] = f.b;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      operand[nt][h] = transpose(pack_halves(y[nt][0][h], split(y[nt][0][h], true)));
  }
#pragma unroll
  for (int t = 0; t < S::head_dim / 16; ++t) {
    uint32_t a[4];
    load_matrices<true>(a, row + 32 * t);
#pragma unroll
    for (int nt = 0; nt < kTiles; ++nt) {
      float c[4] = {};
      mma_halves(c, a, operand[nt][0], operand[nt][1]);
      float* out = state.out[nt] + 2 * t;
      out[0] = __fmaf_rn(c[0] + c[1], b[nt], out[0]);
      out[1] = __fmaf_rn(c[2] + c[3], b[nt], out[1]);
    }
  }
}

template <class S, int kTiles>
__device__ inline void store_raw_state(const State<S::head_dim, kTiles>& s, StoredState<S::head_dim, kTiles>& to,
                                       int lane) {
  const int g = lane >> 2, i = lane & 3;
#pragma unroll
  for (int nt = 0; nt < kTiles; ++nt) {
#pragma unroll
    for (int t = 0; t < S::head_dim / 16; ++t) {
      to.at(nt, 16 * t + g, i) = s.out[nt][2 * t];
      to.at(nt, 16 * t + g + 8, i) = s.out[nt][2 * t + 1];
    }
    if (lane < 4) to.m[4 * nt + lane] = s.m[nt], to.l[4 * nt + lane] = s.l[nt];
  }
}

}  // namespace kvarn::cuda
