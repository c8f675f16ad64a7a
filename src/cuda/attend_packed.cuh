// SPDX-License-Identifier: Apache-2.0
// One packed tile and the columns of a warp, from shared memory.
//
// q * s_k becomes 16-bit integers (two signed bytes) in a unit of the tile; p * s_v likewise (two unsigned bytes), in
// one of the tile and column. Products are exact (attend_product.cuh), so they depend on nothing but the tile and the
// column. Two quads differ from one in where their limbs lie, and in that q * s_k is multiplied once for both; the
// operations on a column are the same, and so are its bits.
#pragma once

#include "cuda/attend_product.cuh"
#include "cuda/attend_softmax.cuh"

namespace kvarn::cuda {

// Where 2 bytes of rows 2 g and + 1 begin. The compiler must not know that these are a lane's upper bits: it would add
// and mask them anew for every row tile.
__device__ inline int own_rows(int lane) {
  int at = 4 * (lane >> 2);
  asm("" : "+r"(at));
  return at;
}

// The largest magnitude of the lane's scales.
template <int kLines>
__device__ inline float largest_of(const uint2 (&scales)[kLines]) {
  __half2 largest = __half2half2(__ushort_as_half(0));
#pragma unroll
  for (const uint2& s : scales) largest = __hmax2(largest, __hmax2(__habs2(halves_of(s.x)), __habs2(halves_of(s.y))));
  const float2 both = __half22float2(largest);
  return fmaxf(both.x, both.y);
}

// Scores in log2 units, y[j][T][h] of token 16 T + 2 g + h and column i of quad j. `queries`: of the quads, below 1, in
// units of their columns.
//
// q * s_k is rounded to a grid that the tile's largest scale gives, by the one addition that moves the integer into a
// float's low bits. Of one quad, two lanes have the same column and need one limb each: one of them works out the even
// lines, one the odd ones, and they exchange.
template <class S, int kQuads>
__device__ inline void packed_scores(const uint8_t* record, const float* queries, const QueryColumn* columns, int lane,
                                     float (&y)[kQuads][S::page_tokens / 16][2]) {
  using M = Matrix<S, true>;
  constexpr int kLines = kQuads == 1 ? M::lines / 2 : M::lines, kApart = M::lines / kLines;  // that a lane works out
  constexpr float kMagic = 12582912.0f + 128.0f;  // 1.5 * 2^23: an integer n in a float's low bits, as n + 128
  const int g = lane >> 2, i = lane & 3, column = query_column<kQuads>(g), odd = kQuads == 1 ? g & 1 : 0;
  const int channel = 16 * odd + 4 * i;
  uint2 scales[kLines];
#pragma unroll
  for (int k = 0; k < kLines; ++k)
    scales[k] = load_as<uint2>(record + S::layout.k_scale + 2 * (channel + 16 * kApart * k));
  float largest = largest_of(scales);
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  if (kQuads == 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 4));
  // 15 bits below a power of two; with 1/250 more, n + 128 stays below 2^15
  const float grid = power_between(exponent_above(largest * 1.004f) - 15), magic = kMagic * grid;

  const float* q = queries + column * query_stride(S::head_dim) + channel;
  const uint8_t* zeros = record + S::layout.k_zero + 2 * channel;
  uint32_t operand[kQuads][M::lines];
  float z[2] = {};  // of even and odd lines
#pragma unroll
  for (int k = 0; k < kLines; ++k) {
    const int at = 16 * kApart * k;
    const float4 x = load_as<float4>(q + at);
    const uint2 zero = load_as<uint2>(zeros + 2 * at);
    const float2 s0 = widen(scales[k].x), s1 = widen(scales[k].y), z0 = widen(zero.x), z1 = widen(zero.y);
    float& sum = z[kQuads == 1 ? 0 : k % 2];
    sum = __fmaf_rn(x.w, z1.y, __fmaf_rn(x.z, z1.x, __fmaf_rn(x.y, z0.y, __fmaf_rn(x.x, z0.x, sum))));
    // n + 128 in 16 bits: byte 1 is the high limb, byte 0 - 128 the low one; columns 0 2 1 3, as a word's bytes
    const uint32_t w0 = __float_as_uint(__fmaf_rn(x.x, s0.x, magic)), w1 = __float_as_uint(__fmaf_rn(x.y, s0.y, magic)),
                   w2 = __float_as_uint(__fmaf_rn(x.z, s1.x, magic)), w3 = __float_as_uint(__fmaf_rn(x.w, s1.y, magic));
    const uint32_t first = __byte_perm(w0, w2, 0x4051), second = __byte_perm(w1, w3, 0x4051);
    if constexpr (kQuads == 1) {
      const uint32_t mine = __byte_perm(first, second, odd ? 0x7632 : 0x5410) ^ (odd ? 0x80808080u : 0u);
      const uint32_t other = __byte_perm(first, second, odd ? 0x5410 : 0x7632) ^ (odd ? 0u : 0x80808080u);
      const uint32_t received = __shfl_xor_sync(~0u, other, 4);
      operand[0][2 * k] = odd ? received : mine;
      operand[0][2 * k + 1] = odd ? mine : received;
    } else {
      operand[0][k] = __byte_perm(first, second, 0x5410);
      operand[1][k] = __byte_perm(first, second, 0x7632) ^ 0x80808080u;
    }
  }
  if (kQuads == 1) z[1] = __shfl_xor_sync(~0u, z[0], 4);
  float sum = z[0] + z[1];
  sum = sum + __shfl_xor_sync(~0u, sum, 1);
  sum = sum + __shfl_xor_sync(~0u, sum, 2);
  float unit[kQuads], zero[kQuads];
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const float up = columns[kQuadColumns * j + i].up;
    unit[j] = grid * up;
    zero[j] = __shfl_sync(~0u, sum, 8 * i + 4 * j) * up;  // from a lane that has the column
  }
  const uint8_t* own = record + own_rows(lane);
  for_blocks<S, true>([&]<int kBlock>() {
    int sums[kQuads][M::fields][2];
    product<S, true, kBlock>(record, operand, lane, sums);
#pragma unroll
    for (int f = 0; f < M::fields; ++f) {
      constexpr int kFirst = kBlock * M::fields;
      const float2 t = widen(load_as<uint32_t>(own + S::layout.k_token + 32 * (kFirst + f)));
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const float u = unit[j] * (1.0f / (1 << M::excess(f)));
        y[j][kFirst + f][0] = __fmaf_rn(__int2float_rn(sums[j][f][0]), u, zero[j]) * t.x;
        y[j][kFirst + f][1] = __fmaf_rn(__int2float_rn(sums[j][f][1]), u, zero[j]) * t.y;
      }
    }
  });
}

// Takes the scores of a tile into the states. `record` points at the whole record, its V part has arrived.
template <class S, int kQuads>
__device__ inline void packed_outputs(const uint8_t* record, float (&y)[kQuads][S::page_tokens / 16][2], int lane,
                                      FullState<S::head_dim> (&state)[kQuads]) {
  using M = Matrix<S, false>;
  constexpr float kRange = 65000.0f, kMagic = 8388608.0f;  // 2^23
  constexpr int kRowTiles = S::page_tokens / 16;
  const uint8_t* own = record + own_rows(lane);
  uint32_t operand[kQuads][M::lines];
  float b[kQuads], z[kQuads] = {}, largest[kQuads] = {}, inverse[kQuads], unit[kQuads], zero[kQuads];
#pragma unroll
  for (int j = 0; j < kQuads; ++j) b[j] = begin_step(state[j], softmax(y[j]));
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    const float2 s = widen(load_as<uint32_t>(own + S::layout.v_scale + 32 * t));
    const float2 zeros = widen(load_as<uint32_t>(own + S::layout.v_zero + 32 * t));
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      z[j] = __fmaf_rn(y[j][t][1], zeros.y, __fmaf_rn(y[j][t][0], zeros.x, z[j]));
      y[j][t][0] *= s.x;
      y[j][t][1] *= s.y;
      largest[j] = fmaxf(largest[j], fmaxf(y[j][t][0], y[j][t][1]));
    }
  }
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    largest[j] = fmaxf(over_rows(largest[j], max_of), 1e-30f);
    inverse[j] = __fdividef(kRange, largest[j]);
    unit[j] = largest[j] * (1.0f / kRange), zero[j] = over_rows(z[j], sum_of);
  }
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    uint32_t w[kQuads];  // the high limbs of both tokens, then the low ones
#pragma unroll
    for (int j = 0; j < kQuads; ++j)
      w[j] = __byte_perm(__float_as_uint(__fmaf_rn(y[j][t][0], inverse[j], kMagic)),
                         __float_as_uint(__fmaf_rn(y[j][t][1], inverse[j], kMagic)), 0x4051);
    if constexpr (kQuads == 2) {
      const uint32_t high = __byte_perm(w[0], w[1], 0x5410), low = __byte_perm(w[0], w[1], 0x7632);
      w[0] = high, w[1] = low;
    }
    // transposed, 4 tokens of one limb; in the order of a word's bytes
#pragma unroll
    for (int j = 0; j < kQuads; ++j) operand[j][t] = __byte_perm(transpose(w[j]), 0, 0x3120);
  }
  for_blocks<S, false>([&]<int kBlock>() {
    int sums[kQuads][M::fields][2];
    product<S, false, kBlock>(record + S::layout.v_codes, operand, lane, sums);
#pragma unroll
    for (int f = 0; f < M::fields; ++f) {
      constexpr int kFirst = kBlock * M::fields;
      const float2 c = widen(load_as<uint32_t>(own + S::layout.v_channel + 32 * (kFirst + f)));
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const float u = unit[j] * (1.0f / (1 << M::excess(f)));
        // The step's own sum is rounded before it is added, so that it may as well be added from memory.
        float* out = state[j].out + 2 * (kFirst + f);
        out[0] = __fmaf_rn(__fmaf_rn(__int2float_rn(sums[j][f][0]), u, zero[j]) * c.x, b[j], out[0]);
        out[1] = __fmaf_rn(__fmaf_rn(__int2float_rn(sums[j][f][1]), u, zero[j]) * c.y, b[j], out[1]);
      }
    }
  });
}

}  // namespace kvarn::cuda
