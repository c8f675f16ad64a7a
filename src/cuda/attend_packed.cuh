// SPDX-License-Identifier: Apache-2.0
// One packed tile and the four columns of a warp, from shared memory: integer products on the codes.
//
// q * s_k becomes 16-bit integers (two signed bytes, the even and the odd column of an MMA) in a unit of the tile and
// column; p * s_v likewise (two unsigned bytes). Products are exact, so they depend on nothing but the tile and the column.
// A word of codes is 4 columns of one row; the fields of a byte are further rows: field f is multiplied together with
// the fields below it and the difference of two sums takes them out (docs/fragment-order.md).
#pragma once

#include "cuda/attend_state.cuh"
#include "cuda/shape.hpp"

namespace kvarn::cuda {

// A code matrix of R rows (tokens of K, channels of V) and C columns that are summed over.
template <class S, bool kKeys>
struct Matrix {
  static constexpr int rows = kKeys ? S::page_tokens : S::head_dim, columns = kKeys ? S::head_dim : S::page_tokens;
  static constexpr format::Planes planes = kKeys ? S::k_planes : S::v_planes;
  static constexpr format::Plane plane = planes.plane[0];
  static constexpr int fields = plane.row_fields;       // row tiles (of 16) of a block
  static constexpr int blocks = rows / (16 * fields);
  static constexpr int lines = columns / 16;            // words of a lane along the columns
  static constexpr bool two_planes = planes.count == 2;
  // A product of field f is this many bits too large; a second plane is combined after shifting them out.
  static constexpr int excess(int field) { return two_planes ? 0 : plane.width * field; }
};

// The words of rows 16 T' + 2 g and + 1 (T' the block's first row tile and those of its fields), columns 16 line + 4 i.
template <int kBlock, int kLine>
__device__ inline uint2 load_words(const format::Plane& plane, const uint8_t* codes, int lane) {
  const int g = lane >> 2, i = lane & 3, fc = plane.column_fields;
  const int step = fc == 1 ? 4 * kLine + i : fc == 2 ? 2 * kLine + (i >> 1) : kLine;
  const int exchanged = fc == 1 ? i & 2 : fc == 2 ? 2 * (kLine & 1) : kLine & 2;
  uint2 words = load_as<uint2>(codes + 64 * (kBlock * plane.steps + step) + 8 * (g ^ (2 * exchanged)));
  if (fc > 1) {
    const int shift = (fc == 2 ? i & 1 : i) * plane.width * plane.row_fields;
    words.x >>= shift;
    words.y >>= shift;
  }
  return words;
}

// Field f and those below it; the only or the topmost field of a byte needs no mask.
__device__ inline uint32_t nested(const format::Plane& plane, uint32_t word, int field) {
  const int bits = (field + 1) * plane.width;
  return bits == 8 ? word : word & ((1u << bits) - 1) * 0x01010101u;
}
__device__ inline uint32_t single(const format::Plane& plane, uint32_t word, int field) {
  return word >> (field * plane.width) & ((1u << plane.width) - 1) * 0x01010101u;
}

// sums[field][h]: row 16 (block * fields + field) + 2 g + h times column i, as 256 * high + low.
template <class S, bool kKeys, int kBlock>
__device__ inline void product(const uint8_t* codes, const uint32_t (&operand)[Matrix<S, kKeys>::lines], int lane,
                               int (&sums)[Matrix<S, kKeys>::fields][2]) {
  using M = Matrix<S, kKeys>;
  constexpr format::Plane plane = M::plane, upper = M::planes.plane[1];
  int c[M::fields][4] = {}, u[M::two_planes ? M::fields : 1][4] = {};
  const auto step = [&]<int kLine>() {
    const uint2 w = load_words<kBlock, kLine>(plane, codes, lane), v = load_words<kBlock, kLine + 1>(plane, codes, lane);
#pragma unroll
    for (int f = 0; f < M::fields; ++f)
      mma_bytes<kKeys>(c[f], nested(plane, w.x, f), nested(plane, w.y, f), nested(plane, v.x, f), nested(plane, v.y, f),
                       operand[kLine], operand[kLine + 1]);
    if constexpr (M::two_planes) {
      constexpr int kUpper = kBlock * M::fields / upper.row_fields, kField = kBlock * M::fields % upper.row_fields;
      const uint8_t* more = codes + plane.bytes();
      const uint2 x = load_words<kUpper, kLine>(upper, more, lane), y = load_words<kUpper, kLine + 1>(upper, more, lane);
#pragma unroll
      for (int f = 0; f < M::fields; ++f)
        mma_bytes<kKeys>(u[f], single(upper, x.x, kField + f), single(upper, x.y, kField + f),
                         single(upper, y.x, kField + f), single(upper, y.y, kField + f), operand[kLine],
                         operand[kLine + 1]);
    }
  };
  [&]<int... kSteps>(std::integer_sequence<int, kSteps...>) {
    (step.template operator()<2 * kSteps>(), ...);
  }(std::make_integer_sequence<int, M::lines / 2>{});

#pragma unroll
  for (int f = M::fields - 1; f >= 0; --f)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int value[2];
#pragma unroll
      for (int limb = 0; limb < 2; ++limb) {
        value[limb] = c[f][2 * h + limb];
        if (f > 0) value[limb] -= c[f - 1][2 * h + limb];
        if constexpr (M::two_planes)
          value[limb] = (value[limb] >> (plane.width * f)) + (u[f][2 * h + limb] << plane.width);
      }
      sums[f][h] = 256 * value[0] + value[1];
    }
}

template <class S, bool kKeys, class Body>
__device__ inline void for_blocks(Body body) {
  [&]<int... kBlocks>(std::integer_sequence<int, kBlocks...>) {
    (body.template operator()<kBlocks>(), ...);
  }(std::make_integer_sequence<int, Matrix<S, kKeys>::blocks>{});
}

// Scores in log2 units, y[T][h] of token 16 T + 2 g + h. `queries` f32 [4][D], rotated and scaled.
template <class S>
__device__ inline void packed_scores(const uint8_t* record, const float* queries, int lane,
                                     float (&y)[S::page_tokens / 16][2]) {
  using M = Matrix<S, true>;
  constexpr float kRange = 32000.0f, kMagic = 12582912.0f;  // 1.5 * 2^23: an integer in a float's low bits
  const int g = lane >> 2, i = lane & 3;
  uint32_t operand[M::lines];
  float r[M::lines][4], largest = 0, z = 0;
#pragma unroll
  for (int line = 0; line < M::lines; ++line) {
    const int d = 16 * line + 4 * i;
    const float4 q = load_as<float4>(queries + (g >> 1) * S::head_dim + d);
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
    operand[line] = __byte_perm(__byte_perm(w[0], w[2], bytes), __byte_perm(w[1], w[3], bytes), 0x5410) ^ sign;
  }
  // From the lanes of column g / 2 to those of column i.
  const float unit = __shfl_sync(~0u, fmaxf(largest, 1e-30f) * (1.0f / kRange), 8 * i);
  const float zero = __shfl_sync(~0u, z, 8 * i);
  for_blocks<S, true>([&]<int kBlock>() {
    int sums[M::fields][2];
    product<S, true, kBlock>(record, operand, lane, sums);
#pragma unroll
    for (int f = 0; f < M::fields; ++f) {
      constexpr int kFirst = kBlock * M::fields;
      const float2 t = widen(load_as<uint32_t>(record + S::layout.k_token + 2 * (16 * (kFirst + f) + 2 * g)));
      const float u = unit * (1.0f / (1 << M::excess(f)));
      y[kFirst + f][0] = __fmaf_rn(__int2float_rn(sums[f][0]), u, zero) * t.x;
      y[kFirst + f][1] = __fmaf_rn(__int2float_rn(sums[f][1]), u, zero) * t.y;
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

// p = 2^(y - m) in place, m the tile's own unit: the integer above its largest score; l their sum.
template <int kRowTiles>
__device__ inline void softmax(float (&y)[kRowTiles][2], float& m, float& l) {
  float largest = fmaxf(y[0][0], y[0][1]);
#pragma unroll
  for (int t = 1; t < kRowTiles; ++t) largest = fmaxf(largest, fmaxf(y[t][0], y[t][1]));
  m = fmaxf(ceilf(over_rows(largest, max_of)), kEmpty);
  float sum[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      y[t][h] = exp2_fast(y[t][h] - m);
      sum[h] += y[t][h];
    }
  l = over_rows(sum[0] + sum[1], sum_of);
}

// The factors by which the state so far and a step of unit m are multiplied; the state's m, l and sums take theirs. The
// unit changes exactly, so the sums are only touched when some column's does: what fold_value does, for no -0 is among them.
template <int kSlices>
__device__ inline float begin_step(State<kSlices>& state, float m, float l) {
  const FoldFactors f = fold_factors(state.m, m);
  state.m = f.m;
  state.l = fold_value(state.l, l, f);
  if (__any_sync(~0u, f.a != 1.0f)) {
#pragma unroll
    for (float& x : state.out) x = __fmaf_rn(x, f.a, 0.0f);
  }
  return f.b;
}

// Takes the scores of a tile into the state. `record` points at the whole record, its V part has arrived.
template <class S>
__device__ inline void packed_outputs(const uint8_t* record, float (&y)[S::page_tokens / 16][2], int lane,
                                      FullState<S::head_dim>& state) {
  using M = Matrix<S, false>;
  constexpr float kRange = 65000.0f, kMagic = 8388608.0f;  // 2^23
  constexpr int kRowTiles = S::page_tokens / 16;
  const int g = lane >> 2;
  uint32_t operand[M::lines];
  float m, l, z = 0, largest = 0;
  softmax(y, m, l);
  const float b = begin_step(state, m, l);
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    const float2 s = widen(load_as<uint32_t>(record + S::layout.v_scale + 2 * (16 * t + 2 * g)));
    const float2 zeros = widen(load_as<uint32_t>(record + S::layout.v_zero + 2 * (16 * t + 2 * g)));
    z = __fmaf_rn(y[t][1], zeros.y, __fmaf_rn(y[t][0], zeros.x, z));
    y[t][0] *= s.x;
    y[t][1] *= s.y;
    largest = fmaxf(largest, fmaxf(y[t][0], y[t][1]));
  }
  largest = fmaxf(over_rows(largest, max_of), 1e-30f);
  const float inverse = __fdividef(kRange, largest);
  const float unit = largest * (1.0f / kRange), zero = over_rows(z, sum_of);
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    const uint32_t w0 = __float_as_uint(__fmaf_rn(y[t][0], inverse, kMagic)),
                   w1 = __float_as_uint(__fmaf_rn(y[t][1], inverse, kMagic));
    // high limbs of both tokens, then low ones; transposed, 4 tokens of one limb; in the order of a word's bytes
    operand[t] = __byte_perm(transpose(__byte_perm(w0, w1, 0x4051)), 0, 0x3120);
  }
  for_blocks<S, false>([&]<int kBlock>() {
    int sums[M::fields][2];
    product<S, false, kBlock>(record + S::layout.v_codes, operand, lane, sums);
#pragma unroll
    for (int f = 0; f < M::fields; ++f) {
      constexpr int kFirst = kBlock * M::fields;
      const float2 c = widen(load_as<uint32_t>(record + S::layout.v_channel + 2 * (16 * (kFirst + f) + 2 * g)));
      const float u = unit * (1.0f / (1 << M::excess(f)));
      // The step's own sum is rounded before it is added, so that it may as well be added from memory.
      float* out = state.out + 2 * (kFirst + f);
      out[0] = __fmaf_rn(__fmaf_rn(__int2float_rn(sums[f][0]), u, zero) * c.x, b, out[0]);
      out[1] = __fmaf_rn(__fmaf_rn(__int2float_rn(sums[f][1]), u, zero) * c.y, b, out[1]);
    }
  });
}

}  // namespace kvarn::cuda
