// SPDX-License-Identifier: Apache-2.0
// One packed tile and the columns of a warp, from shared memory.
//
// q * s_k becomes 16-bit integers (two signed bytes) in a unit of the tile and column; p * s_v likewise (two unsigned
// bytes). Products are exact (attend_product.cuh), so they depend on nothing but the tile and the column. Two quads differ
// from one in where their limbs lie, and in that q * s_k is multiplied once for both; the operations on a column are the
// same, and so are its bits.
#pragma once

#include "cuda/attend_product.cuh"
#include "cuda/attend_state.cuh"

namespace kvarn::cuda {

// Scores in log2 units, y[j][T][h] of token 16 T + 2 g + h and column i of quad j. `queries`: of the quads, rotated and
// scaled.
template <class S, int kQuads>
__device__ inline void packed_scores(const uint8_t* record, const float* queries, int lane,
                                     float (&y)[kQuads][S::page_tokens / 16][2]) {
  using M = Matrix<S, true>;
  constexpr float kRange = 32000.0f, kMagic = 12582912.0f;  // 1.5 * 2^23: an integer in a float's low bits
  const int g = lane >> 2, i = lane & 3, column = query_column<kQuads>(g);
  uint32_t operand[kQuads][M::lines];
  float r[M::lines][4], largest = 0, z = 0;
#pragma unroll
  for (int line = 0; line < M::lines; ++line) {
    const int d = 16 * line + 4 * i;
    const float4 q = load_as<float4>(queries + column * query_stride(S::head_dim) + d);
    const uint2 scale = load_as<uint2>(record + S::layout.k_scale + 2 * d);
    const uint2 zeros = load_as<uint2>(record + S::layout.k_zero + 2 * d);
    const float2 s0 = widen(scale.x), s1 = widen(scale.y), z0 = widen(zeros.x), z1 = widen(zeros.y);
    r[line][0] = q.x * s0.x;
    r[line][1] = q.y * s0.y;
    r[line][2] = q.z * s1.x;
    r[line][3] = q.w * s1.y;
    z = __fmaf_rn(q.w, z1.y, __fmaf_rn(q.z, z1.x, __fmaf_rn(q.y, z0.y, __fmaf_rn(q.x, z0.x, z))));
#pragma unroll
    for (int j = 0; j < 4; ++j) largest = fmaxf(largest, fabsf(r[line][j]));
  }
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  z = z + __shfl_xor_sync(~0u, z, 1);
  z = z + __shfl_xor_sync(~0u, z, 2);
  const float inverse = __fdividef(kRange, fmaxf(largest, 1e-30f));
  const uint32_t bytes = g & 1 ? 0x0040u : 0x0051u, sign = g & 1 ? 0x80808080u : 0u;
#pragma unroll
  for (int line = 0; line < M::lines; ++line) {
    uint32_t w[4];  // value + 128: byte 1 is the high limb, byte 0 - 128 the low one
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = __float_as_uint(__fmaf_rn(r[line][j], inverse, kMagic + 128.0f));
    if constexpr (kQuads == 1) {
      operand[0][line] = __byte_perm(__byte_perm(w[0], w[2], bytes), __byte_perm(w[1], w[3], bytes), 0x5410) ^ sign;
    } else {
      const uint32_t even = __byte_perm(w[0], w[2], 0x4051), odd = __byte_perm(w[1], w[3], 0x4051);
      operand[0][line] = __byte_perm(even, odd, 0x5410);
      operand[1][line] = __byte_perm(even, odd, 0x7632) ^ 0x80808080u;
    }
  }
  float unit[kQuads], zero[kQuads];  // from a lane that has the column to those that have its scores
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    unit[j] = __shfl_sync(~0u, fmaxf(largest, 1e-30f) * (1.0f / kRange), 8 * i + 4 * j);
    zero[j] = __shfl_sync(~0u, z, 8 * i + 4 * j);
  }
  for_blocks<S, true>([&]<int kBlock>() {
    int sums[kQuads][M::fields][2];
    product<S, true, kBlock>(record, operand, lane, sums);
#pragma unroll
    for (int f = 0; f < M::fields; ++f) {
      constexpr int kFirst = kBlock * M::fields;
      const float2 t = widen(load_as<uint32_t>(record + S::layout.k_token + 2 * (16 * (kFirst + f) + 2 * g)));
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const float u = unit[j] * (1.0f / (1 << M::excess(f)));
        y[j][kFirst + f][0] = __fmaf_rn(__int2float_rn(sums[j][f][0]), u, zero[j]) * t.x;
        y[j][kFirst + f][1] = __fmaf_rn(__int2float_rn(sums[j][f][1]), u, zero[j]) * t.y;
      }
    }
  });
}

__device__ inline float over_rows(float x, float (*op)(float, float)) {
  x = op(x, __shfl_xor_sync(~0u, x, 4));
  x = op(x, __shfl_xor_sync(~0u, x, 8));
  return op(x, __shfl_xor_sync(~0u, x, 16));
}
__device__ inline float max_of(float a, float b) { return fmaxf(a, b); }
__device__ inline float sum_of(float a, float b) { return a + b; }

struct StepSum {
  float m, l;
};

// p = 2^(y - m) in place, m the tile's own unit: the integer above its largest score; l their sum.
template <int kRowTiles>
__device__ inline StepSum softmax(float (&y)[kRowTiles][2]) {
  float largest = fmaxf(y[0][0], y[0][1]);
#pragma unroll
  for (int t = 1; t < kRowTiles; ++t) largest = fmaxf(largest, fmaxf(y[t][0], y[t][1]));
  const float m = fmaxf(ceilf(over_rows(largest, max_of)), kEmpty);
  float sum[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      y[t][h] = exp2_fast(y[t][h] - m);
      sum[h] += y[t][h];
    }
  return {m, over_rows(sum[0] + sum[1], sum_of)};
}

// Takes m and l of a step into the state; the state's sums take their factor, and that of the step's is returned. The
// unit changes exactly, so the sums are only touched when some column's does: what fold_value does, for no -0 is among them.
template <int kSlices>
__device__ inline float begin_step(State<kSlices>& state, const StepSum& step) {
  const FoldFactors f = fold_factors(state.m, step.m);
  state.m = f.m;
  state.l = fold_value(state.l, step.l, f);
  if (__any_sync(~0u, f.a != 1.0f)) {
#pragma unroll
    for (float& x : state.out) x = __fmaf_rn(x, f.a, 0.0f);
  }
  return f.b;
}

// Takes the scores of a tile into the states. `record` points at the whole record, its V part has arrived.
template <class S, int kQuads>
__device__ inline void packed_outputs(const uint8_t* record, float (&y)[kQuads][S::page_tokens / 16][2], int lane,
                                      FullState<S::head_dim> (&state)[kQuads]) {
  using M = Matrix<S, false>;
  constexpr float kRange = 65000.0f, kMagic = 8388608.0f;  // 2^23
  constexpr int kRowTiles = S::page_tokens / 16;
  const int g = lane >> 2;
  uint32_t operand[kQuads][M::lines];
  float b[kQuads], z[kQuads] = {}, largest[kQuads] = {}, inverse[kQuads], unit[kQuads], zero[kQuads];
#pragma unroll
  for (int j = 0; j < kQuads; ++j) b[j] = begin_step(state[j], softmax(y[j]));
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    const float2 s = widen(load_as<uint32_t>(record + S::layout.v_scale + 2 * (16 * t + 2 * g)));
    const float2 zeros = widen(load_as<uint32_t>(record + S::layout.v_zero + 2 * (16 * t + 2 * g)));
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
      const float2 c = widen(load_as<uint32_t>(record + S::layout.v_channel + 2 * (16 * (kFirst + f) + 2 * g)));
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
