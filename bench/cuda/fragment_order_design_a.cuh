// SPDX-License-Identifier: Apache-2.0
// The two products from codes in the order that fragment_order.cu compares ours with ("design A"): a word is what a
// lane holds of one fragment, bytes are row halves, the fields of a byte columns, and a warp's 16-byte units are
// consecutive. Fields are read with those below them here too; as they are columns, it is the operand that takes them
// out: field f meets b_f - b_{f+1}.
#pragma once

#include "fragment_order_mma.cuh"

struct DesignALayout {
  __host__ __device__ static constexpr int k_offset(int lane, int tile, int half) {
    return 1024 * tile + 512 * half + 16 * lane;
  }
  __host__ __device__ static constexpr int v_offset(int lane, int tile) { return kVCodes + 512 * tile + 16 * lane; }
  __host__ __device__ static constexpr int token(int lane, int tile, int h) { return 16 * (lane >> 2) + 2 * tile + h; }
  __host__ __device__ static constexpr int channel(int lane, int tile, int h) {
    return 16 * (lane >> 2) + 2 * tile + h;
  }
  // The first of the two columns in K word s, field f (the other is + 1), and in V word j, field f (+ 16).
  __host__ __device__ static constexpr int k_column(int lane, int s, int f) { return 32 * (lane & 3) + 4 * s + 2 * f; }
  __host__ __device__ static constexpr int v_column(int lane, int j, int f) { return 32 * (lane & 3) + 4 * j + f; }
  template <class F>
  static void each_load(F f) {
    for (int i = 0; i < 16; ++i) f([i](int lane) { return k_offset(lane, i / 2, i % 2); });
    for (int i = 0; i < 8; ++i) f([i](int lane) { return v_offset(lane, i); });
  }
  __host__ __device__ static constexpr float score_unit(int, int) { return 1; }
  __host__ __device__ static constexpr float output_unit(int, int) { return 1; }
};

// kNatural: the vectors of the record in natural order and unscaled, as they are in our format (the chain only).
template <bool kNatural>
struct DesignA : DesignALayout {
  using Operand = half;
  static constexpr int kFlight = 4;  // tiles computed side by side: 2 and 8 take as long
  static constexpr int kOperands = 16;
  static constexpr float kUnit = 4194304.f;        // of scores: 2^24 / 4, the record's s_k are scaled by 4 and 1/4
  static constexpr float kOutputUnit = 2097152.f;  // 2^24 / 8, s_v by 8, 2, 1/2 and 1/8

  static __device__ void q_operand(int lane, const half* q, uint32_t (&b)[16]) {
    for (int s = 0; s < 8; ++s) {
      float low[2], high[2];
      for (int j = 0; j < 2; ++j) {
        high[j] = __half2float(q[k_column(lane, s, 1) + j]) * .25f;
        low[j] = __half2float(q[k_column(lane, s, 0) + j]) * 4 - high[j];
      }
      b[2 * s] = as_bits(__floats2half2_rn(low[0], low[1]));
      b[2 * s + 1] = as_bits(__floats2half2_rn(high[0], high[1]));
    }
  }
  static __device__ void p_operand(int lane, const half* p, uint32_t (&b)[16]) {
    for (int j = 0; j < 4; ++j) {
      float above[2] = {};
      for (int f = 3; f >= 0; --f) {
        float part[2];
        for (int k = 0; k < 2; ++k) part[k] = __half2float(p[v_column(lane, j, f) + 16 * k]) * (8.f / (1 << 2 * f));
        b[4 * j + f] = as_bits(__floats2half2_rn(part[0] - above[0], part[1] - above[1]));
        for (int k = 0; k < 2; ++k) above[k] = part[k];
      }
    }
  }

  static __device__ void k_word(uint32_t w, const uint32_t* b, float (&c)[4]) {
    const uint32_t odd = odd_bytes(w);
    mma_f16(c, w & 0x000f000f, odd & 0x000f000f, w & 0x00ff00ff, odd, b[0], b[1]);
  }
  static __device__ void scores(const uint8_t* record, int lane, const uint32_t (&b)[16], float (&c)[8][4]) {
    for (int t0 = 0; t0 < 8; t0 += kFlight)
      for (int half = 0; half < 2; ++half) {
        uint4 w[kFlight];
        for (int t = 0; t < kFlight; ++t) w[t] = load<uint4>(record + k_offset(lane, t0 + t, half));
        for (int t = 0; t < kFlight; ++t) k_word(w[t].x, b + 8 * half, c[t0 + t]);
        for (int t = 0; t < kFlight; ++t) k_word(w[t].y, b + 8 * half + 2, c[t0 + t]);
        for (int t = 0; t < kFlight; ++t) k_word(w[t].z, b + 8 * half + 4, c[t0 + t]);
        for (int t = 0; t < kFlight; ++t) k_word(w[t].w, b + 8 * half + 6, c[t0 + t]);
      }
  }

  static __device__ void v_word(uint32_t w, const uint32_t* b, float (&c)[4]) {
    const uint32_t odd = odd_bytes(w);
    mma_f16(c, w & 0x00030003, odd & 0x00030003, w & 0x000f000f, odd & 0x000f000f, b[0], b[1]);
    mma_f16(c, w & 0x003f003f, odd & 0x003f003f, w & 0x00ff00ff, odd, b[2], b[3]);
  }
  static __device__ void outputs(const uint8_t* record, int lane, const uint32_t (&b)[16], float (&c)[8][4]) {
    for (int t0 = 0; t0 < 8; t0 += kFlight) {
      uint4 w[kFlight];
      for (int t = 0; t < kFlight; ++t) w[t] = load<uint4>(record + v_offset(lane, t0 + t));
      for (int t = 0; t < kFlight; ++t) v_word(w[t].x, b, c[t0 + t]);
      for (int t = 0; t < kFlight; ++t) v_word(w[t].y, b + 4, c[t0 + t]);
      for (int t = 0; t < kFlight; ++t) v_word(w[t].z, b + 8, c[t0 + t]);
      for (int t = 0; t < kFlight; ++t) v_word(w[t].w, b + 12, c[t0 + t]);
    }
  }

  // The chain. Channel vectors lie so that a lane's share is contiguous; s_v in the order [i][tile][h][2].
  static __device__ void q_natural(int lane, const half* q, uint32_t (&n)[16]) {
    for (int s = 0; s < 8; ++s)
      for (int f = 0; f < 2; ++f) {
        n[2 * s + f] = *reinterpret_cast<const uint32_t*>(q + k_column(lane, s, f));
        if (kNatural) n[2 * s + f] = as_bits(__hmul2(as_half2(n[2 * s + f]), __float2half2_rn(f ? .25f : 4.f)));
      }
  }
  static __device__ void fold_q(const uint8_t* record, int lane, const uint32_t (&n)[16], uint32_t (&b)[16]) {
    for (int s = 0; s < 8; s += 2) {
      const uint4 scale = load<uint4>(record + kKScale + 64 * (lane & 3) + 8 * s);
      const uint32_t part[4] = {scale.x, scale.y, scale.z, scale.w};
      for (int j = 0; j < 4; j += 2) {
        const half2 high = __hmul2(as_half2(n[2 * s + j + 1]), as_half2(part[j + 1]));
        b[2 * s + j] = as_bits(__hfma2(as_half2(n[2 * s + j]), as_half2(part[j]), __hneg2(high)));
        b[2 * s + j + 1] = as_bits(high);
      }
    }
  }
  static __device__ void row_factors(const uint8_t* at, float (&f)[8][2]) {
    for (int half = 0; half < 2; ++half) {
      const uint4 t = load<uint4>(at + 16 * half);
      widen(t.x, f[4 * half][0], f[4 * half][1]);
      widen(t.y, f[4 * half + 1][0], f[4 * half + 1][1]);
      widen(t.z, f[4 * half + 2][0], f[4 * half + 2][1]);
      widen(t.w, f[4 * half + 3][0], f[4 * half + 3][1]);
    }
  }
  static __device__ void token_factors(const uint8_t* record, int lane, float (&f)[8][2]) {
    row_factors(record + kKToken + 32 * (lane >> 2), f);
  }
  static __device__ void channel_factors(const uint8_t* record, int lane, float (&f)[8][2]) {
    row_factors(record + kVChannel + 32 * (lane >> 2), f);
  }
  static __device__ void fold_p(const uint8_t* record, int lane, const uint32_t (&m)[8][2], uint32_t (&b)[16]) {
    for (int j = 0; j < 4; ++j) {
      uint4 scale;
      if constexpr (kNatural) {
        const uint2 a = load<uint2>(record + kVScale + 64 * (lane & 3) + 8 * j),
                    b = load<uint2>(record + kVScale + 64 * (lane & 3) + 32 + 8 * j);
        const half2 s0 = as_half2(__byte_perm(a.x, b.x, kLowHalves)), s1 = as_half2(__byte_perm(a.x, b.x, kHighHalves));
        const half2 s2 = as_half2(__byte_perm(a.y, b.y, kLowHalves)), s3 = as_half2(__byte_perm(a.y, b.y, kHighHalves));
        scale = {as_bits(__hmul2(s0, __float2half2_rn(8))), as_bits(__hmul2(s1, __float2half2_rn(2))),
                 as_bits(__hmul2(s2, __float2half2_rn(.5f))), as_bits(__hmul2(s3, __float2half2_rn(.125f)))};
      } else {
        scale = load<uint4>(record + kVScale + 64 * (lane & 3) + 16 * j);
      }
      const half2 p3 = __hmul2(as_half2(m[2 * j + 1][1]), as_half2(scale.w));
      const half2 p2 = __hmul2(as_half2(m[2 * j + 1][0]), as_half2(scale.z));
      const half2 p1 = __hmul2(as_half2(m[2 * j][1]), as_half2(scale.y));
      b[4 * j + 3] = as_bits(p3);
      b[4 * j + 2] = as_bits(__hsub2(p2, p3));
      b[4 * j + 1] = as_bits(__hsub2(p1, p2));
      b[4 * j] = as_bits(__hfma2(as_half2(m[2 * j][0]), as_half2(scale.x), __hneg2(p1)));
    }
  }
};

// int8 operands on the same order: a row's bytes must first be gathered from two words. The fields of a byte are
// columns with different weights; one accumulator takes them all, which is kinder than a kernel could be: with two
// limbs per operand the fields of high weight would leave too few bits for the operands and need accumulators of their
// own.
struct DesignAInt8 : DesignALayout {
  using Operand = int8_t;
  static constexpr int kOperands = 8;
  static constexpr float kUnit = 1.f;
  static constexpr float kOutputUnit = 1.f;

  __device__ static uint32_t bytes(int8_t a, int8_t b, int8_t c, int8_t d) {
    return uint32_t(uint8_t(a)) | uint32_t(uint8_t(b)) << 8 | uint32_t(uint8_t(c)) << 16 | uint32_t(uint8_t(d)) << 24;
  }
  static __device__ void q_operand(int lane, const int8_t* q, uint32_t (&b)[8]) {
    for (int s = 0; s < 4; ++s)
      for (int f = 0; f < 2; ++f) {
        const int8_t *x = q + k_column(lane, 2 * s, f), *y = q + k_column(lane, 2 * s + 1, f);
        b[2 * s + f] = bytes(x[0], x[1], y[0], y[1]);
      }
  }
  static __device__ void p_operand(int lane, const int8_t* p, uint32_t (&b)[8]) {
    for (int j = 0; j < 2; ++j)
      for (int f = 0; f < 4; ++f) {
        const int8_t *x = p + v_column(lane, 2 * j, f), *y = p + v_column(lane, 2 * j + 1, f);
        b[4 * j + f] = bytes(x[0], x[16], y[0], y[16]);
      }
  }
  static __device__ void start(int (&c)[8][4]) {
    for (auto& tile : c)
      for (int& x : tile) x = kMagicBits;
  }
  static __device__ void finish(const int (&c)[8][4], float (&f)[8][4]) {
    for (int t = 0; t < 8; ++t)
      for (int j = 0; j < 4; ++j) f[t][j] = __int_as_float(c[t][j]) - kMagic;
  }
  static constexpr uint32_t kRowG = 0x6420, kRowG8 = 0x7531;  // bytes of a row half from two words

  static __device__ void k_words(uint32_t w, uint32_t v, const uint32_t* b, int (&c)[4]) {
    const uint32_t x = __byte_perm(w, v, kRowG), y = __byte_perm(w, v, kRowG8);
    mma_s8(c, x & 0x0f0f0f0f, y & 0x0f0f0f0f, x, y, b[0], b[1]);
  }
  static __device__ void scores(const uint8_t* record, int lane, const uint32_t (&b)[8], float (&f)[8][4]) {
    int c[8][4];
    start(c);
    for (int half = 0; half < 2; ++half) {
      uint4 w[8];
      for (int t = 0; t < 8; ++t) w[t] = load<uint4>(record + k_offset(lane, t, half));
      for (int t = 0; t < 8; ++t) k_words(w[t].x, w[t].y, b + 4 * half, c[t]);
      for (int t = 0; t < 8; ++t) k_words(w[t].z, w[t].w, b + 4 * half + 2, c[t]);
    }
    finish(c, f);
  }
  static __device__ void v_words(uint32_t w, uint32_t v, const uint32_t* b, int (&c)[4]) {
    const uint32_t x = __byte_perm(w, v, kRowG), y = __byte_perm(w, v, kRowG8);
    mma_s8(c, x & 0x03030303, y & 0x03030303, x & 0x0f0f0f0f, y & 0x0f0f0f0f, b[0], b[1]);
    mma_s8(c, x & 0x3f3f3f3f, y & 0x3f3f3f3f, x, y, b[2], b[3]);
  }
  static __device__ void outputs(const uint8_t* record, int lane, const uint32_t (&b)[8], float (&f)[8][4]) {
    int c[8][4];
    start(c);
    uint4 w[8];
    for (int t = 0; t < 8; ++t) w[t] = load<uint4>(record + v_offset(lane, t));
    for (int t = 0; t < 8; ++t) v_words(w[t].x, w[t].y, b, c[t]);
    for (int t = 0; t < 8; ++t) v_words(w[t].z, w[t].w, b + 4, c[t]);
    finish(c, f);
  }
};
