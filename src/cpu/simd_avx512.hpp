// SPDX-License-Identifier: Apache-2.0
// 16 lanes in AVX-512 (F, BW, DQ, VL, VNNI). The same names as simd_avx2.hpp; the verbs are written once on top.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/inline.hpp"

namespace kvarn::KVARN_CPU {

// Of the integer product: 2 x 4 x 2 limbs = 16 of 32 registers accumulate.
inline constexpr int kRowBlocks = 2, kColumnBlock = 4;
inline constexpr int kRawVectors = 4;  // of the raw tile's values: 4 x 4 columns

using F = __m512;     // 16 floats; + - * / are the compiler's
using I = __m512i;    // 16 int32, or 64 bytes
using M = __mmask16;  // 16 truths

KVARN_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
KVARN_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
KVARN_INLINE F set(float x) { return _mm512_set1_ps(x); }
KVARN_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }  // a < b ? a : b
KVARN_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }  // a > b ? a : b
KVARN_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
KVARN_INLINE F sqrt(F x) { return _mm512_sqrt_ps(x); }
KVARN_INLINE F rint(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
KVARN_INLINE F abs(F x) { return _mm512_abs_ps(x); }
KVARN_INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
KVARN_INLINE M ordered(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q); }  // not NaN
KVARN_INLINE M both(M a, M b) { return static_cast<M>(a & b); }
KVARN_INLINE F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
KVARN_INLINE int count(M m) { return __builtin_popcount(m); }

KVARN_INLINE F load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KVARN_INLINE void store_f16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
KVARN_INLINE F load_u16_high(const uint16_t* p) {  // 16-bit words into the upper halves: bf16
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
KVARN_INLINE void store_u16(uint16_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}

KVARN_INLINE I set(int32_t x) { return _mm512_set1_epi32(x); }
KVARN_INLINE I zero() { return _mm512_setzero_si512(); }
KVARN_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
KVARN_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
KVARN_INLINE I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
KVARN_INLINE I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
KVARN_INLINE I shift_left(I a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
KVARN_INLINE I shift_right(I a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
KVARN_INLINE I shift_right_signed(I a, int n) { return _mm512_srai_epi32(a, static_cast<unsigned>(n)); }
KVARN_INLINE I to_int(F x) { return _mm512_cvtps_epi32(x); }
KVARN_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
KVARN_INLINE I as_int(F x) { return _mm512_castps_si512(x); }
KVARN_INLINE F as_float(I x) { return _mm512_castsi512_ps(x); }

KVARN_INLINE I load_bytes(const void* p) { return _mm512_loadu_si512(p); }
KVARN_INLINE void store_bytes(void* p, I x) { _mm512_storeu_si512(p, x); }
KVARN_INLINE I exchange_halves(I x) { return _mm512_shuffle_i64x2(x, x, 0x4e); }
KVARN_INLINE void store_lanes_u8(uint8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
// 16 lanes as signed bytes, each four of them in the order of a word's columns (format::word_byte).
KVARN_INLINE void store_words_i8(int8_t* p, I x) {
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(x), order));
}
KVARN_INLINE F load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// acc + sum of 4 products of unsigned bytes (codes) and signed bytes (one quad for all lanes). kWide: codes above 15.
// Written as assembly because gcc 12 copies the accumulator around the intrinsic, half of the loop's instructions.
template <bool kWide>
KVARN_INLINE I dot(I acc, I codes, int32_t quad) {
  const I all = _mm512_set1_epi32(quad);
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(all));
  return acc;
}

// x[lane XOR h]
template <int h>
KVARN_INLINE F exchange(F x) {
  if constexpr (h == 1) return _mm512_permute_ps(x, 0xb1);
  if constexpr (h == 2) return _mm512_permute_ps(x, 0x4e);
  if constexpr (h == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
  if constexpr (h == 8) return _mm512_shuffle_f32x4(x, x, 0x4e);
}
// lanes whose bit h is set from b, the others from a
template <int h>
KVARN_INLINE F blend(F a, F b) {
  constexpr M lanes = h == 1 ? 0xaaaa : h == 2 ? 0xcccc : h == 4 ? 0xf0f0 : 0xff00;
  return _mm512_mask_blend_ps(lanes, a, b);
}
// -x in the lanes whose bit h is set
template <int h>
KVARN_INLINE F negate(F x) {
  constexpr M lanes = h == 1 ? 0xaaaa : h == 2 ? 0xcccc : h == 4 ? 0xf0f0 : 0xff00;
  return _mm512_mask_xor_ps(x, lanes, x, _mm512_set1_ps(-0.0f));
}
KVARN_INLINE float first(F x) { return _mm512_cvtss_f32(x); }

}  // namespace kvarn::KVARN_CPU
