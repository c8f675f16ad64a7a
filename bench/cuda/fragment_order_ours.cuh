// SPDX-License-Identifier: Apache-2.0
// The two products of attention from codes in fragment order (docs/specification.md, section 4).
//
// A word is 4 adjacent columns of one slot: with fp16 operands bytes 0 and 2, then 1 and 3, are the pairs of a k16
// step, with int8 operands the word is the lane's share of a k32 step. The fields of a byte are rows 16 apart and go to
// rows g and g + 8 of one tile: field f is read together with the fields below it, x_f = sum of 4^j c_j (16^j for K),
// which saves the shifts, and the difference of two accumulators takes them out again.
//
// A lane reads 16 bytes: 4 slots, one word for each of 4 tiles. Lane (g, i) takes unit g & 3 of a line, the lanes with
// g >= 4 from the next row block, and the four i's take steps of which two are odd and two have their halves exchanged,
// in all four combinations: every quarter warp touches each bank once.
#pragma once

#include "fragment_order_mma.cuh"

struct OursLayout {
  __host__ __device__ static constexpr int unit(int lane, int step) { return 16 * ((lane >> 2 & 3) ^ (step & 2)); }

  // K: 64-token half x, k16 step s of 8.
  __host__ __device__ static constexpr int k_step(int lane, int s) { return 4 * s + (lane & 3); }
  __host__ __device__ static constexpr int k_offset(int lane, int x, int s) {
    return 4096 * x + 2048 * (lane >> 4) + 64 * k_step(lane, s) + unit(lane, lane & 3);
  }
  // Row of tile 4 x + word, half h.
  __host__ __device__ static constexpr int token(int lane, int tile, int h) {
    return 64 * (tile >> 2) + 32 * (lane >> 4) + 16 * h + 4 * (lane >> 2 & 3) + (tile & 3);
  }

  // V: k16 step s = 4 x + 2 h + e of 8. A lane's two steps for (x, h) are neighbours, those whose tokens it holds once
  // the scores of tiles 4 x to 4 x + 3, half h, are transposed; which of them comes first keeps the banks apart.
  __host__ __device__ static constexpr int v_step(int lane, int s) {
    return 16 * (s >> 2) + 4 * (s >> 1 & 1) + (8 * (lane >> 1 & 1) + 2 * (lane & 1) + ((s & 1) ^ (lane >> 1 & 1)));
  }
  __host__ __device__ static constexpr int v_offset(int lane, int s) {
    return kVCodes + 1024 * (s >> 2) + 256 * (s >> 1 & 1) +
           (2048 * (lane >> 4) + 64 * v_step(lane, s & 1) + unit(lane, 2 * (lane & 1)));
  }
  // Row of tile 4 (field / 2) + word, half field % 2.
  __host__ __device__ static constexpr int channel(int lane, int tile, int h) {
    return 64 * (lane >> 4) + 32 * (tile >> 2) + 16 * h + 4 * (lane >> 2 & 3) + (tile & 3);
  }
  template <class F>
  static void each_load(F f) {
    for (int i = 0; i < 16; ++i) f([i](int lane) { return k_offset(lane, i / 8, i % 8); });
    for (int i = 0; i < 8; ++i) f([i](int lane) { return v_offset(lane, i); });
  }
  // What a result is a multiple of, besides the codes' unit.
  __host__ __device__ static constexpr float score_unit(int, int h) { return h ? 1.f / 16 : 1.f; }
  __host__ __device__ static constexpr float output_unit(int tile, int h) {
    return 1.f / (1 << 2 * (2 * (tile >> 2) + h));
  }
};

// kNested: fields with those below them, and differences; else each field by its own mask.
// kSwapped: a word's bytes are columns 0 2 1 3, as in the format, so that a k16 step's pairs are neighbours; else 0 1
// 2 3. kWide: all 8 tiles of K in flight, else 4 and then 4.
template <bool kNested, bool kSwapped, bool kWide>
struct Ours : OursLayout {
  using Operand = half;
  static constexpr int kOperands = 16;
  static constexpr float kUnit = 16777216.f;  // a code in the low bits of an fp16 is code * 2^-24
  static constexpr float kOutputUnit = kUnit;

  static __device__ void natural(const half* step, uint32_t (&b)[16], int s) {
    for (int j = 0; j < 2; ++j) b[2 * s + j] = reinterpret_cast<const uint32_t*>(step)[j];
  }
  // Natural pairs to those of the bytes.
  static __device__ void place(uint32_t low, uint32_t high, uint32_t (&b)[16], int s) {
    b[2 * s] = kSwapped ? low : __byte_perm(low, high, kLowHalves);
    b[2 * s + 1] = kSwapped ? high : __byte_perm(low, high, kHighHalves);
  }
  static __device__ void q_operand(int lane, const half* q, uint32_t (&b)[16]) {
    for (int s = 0; s < 8; ++s) natural(q + 4 * k_step(lane, s), b, s), place(b[2 * s], b[2 * s + 1], b, s);
  }
  static __device__ void p_operand(int lane, const half* p, uint32_t (&b)[16]) {
    for (int s = 0; s < 8; ++s) natural(p + 4 * v_step(lane, s), b, s), place(b[2 * s], b[2 * s + 1], b, s);
  }

  static __device__ void k_tile(uint32_t w, uint32_t b0, uint32_t b1, float (&c)[4]) {
    const uint32_t odd = kNested ? odd_bytes(w) : w >> 8;
    if constexpr (kNested)
      mma_f16(c, w & 0x000f000f, w & 0x00ff00ff, odd & 0x000f000f, odd, b0, b1);
    else
      mma_f16(c, w & 0x000f000f, w & 0x00f000f0, odd & 0x000f000f, odd & 0x00f000f0, b0, b1);
  }
  static __device__ void scores(const uint8_t* record, int lane, const uint32_t (&b)[16], float (&c)[8][4]) {
    for (int i = 0; i < 16; ++i) {
      const int x = kWide ? i % 2 : i / 8, s = kWide ? i / 2 : i % 8;
      const uint4 w = load<uint4>(record + k_offset(lane, x, s));
      k_tile(w.x, b[2 * s], b[2 * s + 1], c[4 * x]);
      k_tile(w.y, b[2 * s], b[2 * s + 1], c[4 * x + 1]);
      k_tile(w.z, b[2 * s], b[2 * s + 1], c[4 * x + 2]);
      k_tile(w.w, b[2 * s], b[2 * s + 1], c[4 * x + 3]);
    }
    if constexpr (kNested)
      for (int t = 0; t < 8; ++t)
        for (int j = 0; j < 2; ++j) c[t][2 + j] -= c[t][j];
  }

  static __device__ void v_tiles(uint32_t w, uint32_t b0, uint32_t b1, float (&low)[4], float (&high)[4]) {
    const uint32_t odd = kNested ? odd_bytes(w) : w >> 8;
    if constexpr (kNested) {
      mma_f16(low, w & 0x00030003, w & 0x000f000f, odd & 0x00030003, odd & 0x000f000f, b0, b1);
      mma_f16(high, w & 0x003f003f, w & 0x00ff00ff, odd & 0x003f003f, odd, b0, b1);
    } else {
      mma_f16(low, w & 0x00030003, w & 0x000c000c, odd & 0x00030003, odd & 0x000c000c, b0, b1);
      mma_f16(high, w & 0x00300030, w & 0x00c000c0, odd & 0x00300030, odd & 0x00c000c0, b0, b1);
    }
  }
  static __device__ void outputs(const uint8_t* record, int lane, const uint32_t (&b)[16], float (&c)[8][4]) {
    for (int s = 0; s < 8; ++s) {
      const uint4 w = load<uint4>(record + v_offset(lane, s));
      v_tiles(w.x, b[2 * s], b[2 * s + 1], c[0], c[4]);
      v_tiles(w.y, b[2 * s], b[2 * s + 1], c[1], c[5]);
      v_tiles(w.z, b[2 * s], b[2 * s + 1], c[2], c[6]);
      v_tiles(w.w, b[2 * s], b[2 * s + 1], c[3], c[7]);
    }
    if constexpr (kNested)
      for (int t = 0; t < 4; ++t)
        for (int j = 0; j < 2; ++j) {
          c[4 + t][2 + j] -= c[4 + t][j];
          c[4 + t][j] -= c[t][2 + j];
          c[t][2 + j] -= c[t][j];
        }
  }

  // The chain: q stays in natural pairs (the zero terms want it so), q s_k is paired as the bytes are.
  static __device__ void q_natural(int lane, const half* q, uint32_t (&n)[16]) {
    for (int s = 0; s < 8; ++s) natural(q + 4 * k_step(lane, s), n, s);
  }
  static __device__ void fold_q(const uint8_t* record, int lane, const uint32_t (&n)[16], uint32_t (&b)[16]) {
    for (int s = 0; s < 8; ++s) {
      const uint2 scale = load<uint2>(record + kKScale + 8 * k_step(lane, s));
      place(multiply(n[2 * s], scale.x), multiply(n[2 * s + 1], scale.y), b, s);
    }
  }
  static __device__ void token_factors(const uint8_t* record, int lane, float (&f)[8][2]) {
    for (int x = 0; x < 2; ++x)
      for (int h = 0; h < 2; ++h) {
        const uint2 t = load<uint2>(record + kKToken + 2 * token(lane, 4 * x, h));
        widen(t.x, f[4 * x][h], f[4 * x + 1][h]);
        widen(t.y, f[4 * x + 2][h], f[4 * x + 3][h]);
      }
  }
  // m[tile][h]: transposed probabilities, two neighbouring slots of tile 4 x + word in a register
  static __device__ void fold_p(const uint8_t* record, int lane, const uint32_t (&m)[8][2], uint32_t (&b)[16]) {
    const uint32_t first = lane & 2 ? kHighHalves : kLowHalves, second = lane & 2 ? kLowHalves : kHighHalves;
    for (int s = 0; s < 8; ++s) {
      const int tile = 4 * (s >> 2), h = s >> 1 & 1;
      const uint2 scale = load<uint2>(record + kVScale + 8 * v_step(lane, s));
      const uint32_t mine = s & 1 ? second : first;
      place(multiply(__byte_perm(m[tile][h], m[tile + 1][h], mine), scale.x),
            multiply(__byte_perm(m[tile + 2][h], m[tile + 3][h], mine), scale.y), b, s);
    }
  }
  static __device__ void channel_factors(const uint8_t* record, int lane, float (&f)[8][2]) {
    for (int x = 0; x < 2; ++x)
      for (int h = 0; h < 2; ++h) {
        const uint2 t = load<uint2>(record + kVChannel + 2 * channel(lane, 4 * x, h));
        widen(t.x, f[4 * x][h], f[4 * x + 1][h]);
        widen(t.y, f[4 * x + 2][h], f[4 * x + 3][h]);
      }
  }
};

// int8 operands: columns are limbs of heads. The words are read as for fp16, two k16 steps are one k32 step.
struct OursInt8 : OursLayout {
  using Operand = int8_t;
  static constexpr int kOperands = 8;
  static constexpr float kUnit = 1.f;
  static constexpr float kOutputUnit = 1.f;

  static __device__ void q_operand(int lane, const int8_t* q, uint32_t (&b)[8]) {
    for (int s = 0; s < 8; ++s) b[s] = *reinterpret_cast<const uint32_t*>(q + 4 * k_step(lane, s));
  }
  static __device__ void p_operand(int lane, const int8_t* p, uint32_t (&b)[8]) {
    for (int s = 0; s < 8; ++s) b[s] = *reinterpret_cast<const uint32_t*>(p + 4 * v_step(lane, s));
  }
  static __device__ void k_tile(uint32_t w, uint32_t v, uint32_t b0, uint32_t b1, int (&c)[4]) {
    mma_s8(c, w & 0x0f0f0f0f, w, v & 0x0f0f0f0f, v, b0, b1);
  }
  // The difference that takes the lower fields out takes the magic number out as well: it costs nothing here.
  static __device__ void scores(const uint8_t* record, int lane, const uint32_t (&b)[8], float (&f)[8][4]) {
    int c[8][4];
    for (auto& tile : c)
      for (int& x : tile) x = kMagicBits;
    for (int s = 0; s < 8; s += 2)
      for (int x = 0; x < 2; ++x) {
        const uint4 w = load<uint4>(record + k_offset(lane, x, s)), v = load<uint4>(record + k_offset(lane, x, s + 1));
        k_tile(w.x, v.x, b[s], b[s + 1], c[4 * x]);
        k_tile(w.y, v.y, b[s], b[s + 1], c[4 * x + 1]);
        k_tile(w.z, v.z, b[s], b[s + 1], c[4 * x + 2]);
        k_tile(w.w, v.w, b[s], b[s + 1], c[4 * x + 3]);
      }
    for (int t = 0; t < 8; ++t)
      for (int j = 0; j < 2; ++j) {
        f[t][2 + j] = __int_as_float(c[t][2 + j]) - __int_as_float(c[t][j]);
        f[t][j] = __int_as_float(c[t][j]) - kMagic;
      }
  }
  static __device__ void v_tiles(uint32_t w, uint32_t v, uint32_t b0, uint32_t b1, int (&low)[4], int (&high)[4]) {
    mma_s8(low, w & 0x03030303, w & 0x0f0f0f0f, v & 0x03030303, v & 0x0f0f0f0f, b0, b1);
    mma_s8(high, w & 0x3f3f3f3f, w, v & 0x3f3f3f3f, v, b0, b1);
  }
  static __device__ void outputs(const uint8_t* record, int lane, const uint32_t (&b)[8], float (&f)[8][4]) {
    int c[8][4];
    for (auto& tile : c)
      for (int& x : tile) x = kMagicBits;
    for (int s = 0; s < 8; s += 2) {
      const uint4 w = load<uint4>(record + v_offset(lane, s)), v = load<uint4>(record + v_offset(lane, s + 1));
      v_tiles(w.x, v.x, b[s], b[s + 1], c[0], c[4]);
      v_tiles(w.y, v.y, b[s], b[s + 1], c[1], c[5]);
      v_tiles(w.z, v.z, b[s], b[s + 1], c[2], c[6]);
      v_tiles(w.w, v.w, b[s], b[s + 1], c[3], c[7]);
    }
    for (int t = 0; t < 4; ++t)
      for (int j = 0; j < 2; ++j) {
        f[4 + t][2 + j] = __int_as_float(c[4 + t][2 + j]) - __int_as_float(c[4 + t][j]);
        f[4 + t][j] = __int_as_float(c[4 + t][j]) - __int_as_float(c[t][2 + j]);
        f[t][2 + j] = __int_as_float(c[t][2 + j]) - __int_as_float(c[t][j]);
        f[t][j] = __int_as_float(c[t][j]) - kMagic;
      }
  }
};
