// SPDX-License-Identifier: Apache-2.0
// 16 lanes in two AVX2 registers. The same names as simd_avx512.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/inline.hpp"

namespace kvarn::KVARN_CPU {

// Of the integer product: 1 x 2 x 2 limbs of two registers each = 8 of 16 registers accumulate.
inline constexpr int kRowBlocks = 1, kColumnBlock = 2;
inline constexpr int kRawVectors = 2;  // of the raw tile's values: 2 x 2 columns

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
struct M {
  __m256 a, b;
};

KVARN_INLINE F operator+(F x, F y) { return {x.a + y.a, x.b + y.b}; }
KVARN_INLINE F operator-(F x, F y) { return {x.a - y.a, x.b - y.b}; }
KVARN_INLINE F operator*(F x, F y) { return {x.a * y.a, x.b * y.b}; }
KVARN_INLINE F operator/(F x, F y) { return {x.a / y.a, x.b / y.b}; }

KVARN_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KVARN_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
KVARN_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
KVARN_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }  // x < y ? x : y
KVARN_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }  // x > y ? x : y
KVARN_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
KVARN_INLINE F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
KVARN_INLINE F rint(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
KVARN_INLINE F abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
KVARN_INLINE M less(F x, F y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)}; }
KVARN_INLINE M ordered(F x) {
  return {_mm256_cmp_ps(x.a, x.a, _CMP_ORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_ORD_Q)};
}  // not NaN
KVARN_INLINE M both(M x, M y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
KVARN_INLINE F select(M m, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
KVARN_INLINE int count(M m) {
  return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(m.a) << 8 | _mm256_movemask_ps(m.b)));
}

KVARN_INLINE __m128i half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
KVARN_INLINE F load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(half(p)), _mm256_cvtph_ps(half(p + 8))}; }
KVARN_INLINE void store_f16(uint16_t* p, F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, mode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, mode));
}
KVARN_INLINE F load_u16_high(const uint16_t* p) {  // 16-bit words into the upper halves: bf16
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(p + 8)), 16))};
}
KVARN_INLINE void store_u16(uint16_t* p, I x) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}

KVARN_INLINE I set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
KVARN_INLINE I zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
KVARN_INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
KVARN_INLINE I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
KVARN_INLINE I bit_and(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
KVARN_INLINE I bit_or(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
KVARN_INLINE I shift_left(I x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
KVARN_INLINE I shift_right(I x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
KVARN_INLINE I shift_right_signed(I x, int n) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
KVARN_INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
KVARN_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
KVARN_INLINE I as_int(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
KVARN_INLINE F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

KVARN_INLINE I load_bytes(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
KVARN_INLINE void store_bytes(void* p, I x) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a), _mm256_storeu_si256(q + 1, x.b);
}
KVARN_INLINE I exchange_halves(I x) { return {x.b, x.a}; }
KVARN_INLINE __m128i narrow(I x) {  // lanes of 0 to 255 to bytes
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
KVARN_INLINE void store_lanes_u8(uint8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
// 16 lanes as signed bytes, each four of them in the order of a word's columns (format::word_byte).
KVARN_INLINE void store_words_i8(int8_t* p, I x) {
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  const __m128i bytes =
      narrow({_mm256_and_si256(x.a, _mm256_set1_epi32(255)), _mm256_and_si256(x.b, _mm256_set1_epi32(255))});
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi8(bytes, order));
}
KVARN_INLINE F load_u8(const uint8_t* p) {
  const __m128i bytes = half(p);
  return to_float({_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
}

KVARN_INLINE __m256i dot_narrow(__m256i codes, __m256i quad) {  // codes <= 15: 15 * 127 * 2 fits int16
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, quad), _mm256_set1_epi16(1));
}
// acc + sum of 4 products of unsigned bytes (codes) and signed bytes (one quad for all lanes). kWide: codes above 15,
// taken in two halves because the 16-bit pair sums would saturate.
template <bool kWide>
KVARN_INLINE __m256i dot(__m256i acc, __m256i codes, __m256i quad) {
  if constexpr (!kWide) return _mm256_add_epi32(acc, dot_narrow(codes, quad));
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i high = dot_narrow(_mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), quad);
  const __m256i low = dot_narrow(_mm256_and_si256(codes, mask), quad);
  return _mm256_add_epi32(acc, _mm256_add_epi32(low, _mm256_slli_epi32(high, 4)));
}
template <bool kWide>
KVARN_INLINE I dot(I acc, I codes, int32_t quad) {
  const __m256i all = _mm256_set1_epi32(quad);
  return {dot<kWide>(acc.a, codes.a, all), dot<kWide>(acc.b, codes.b, all)};
}

// x[lane XOR h]
template <int h>
KVARN_INLINE F exchange(F x) {
  if constexpr (h == 1) return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
  if constexpr (h == 2) return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)};
  if constexpr (h == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
  if constexpr (h == 8) return {x.b, x.a};
}
// lanes whose bit h is set from y, the others from x
template <int h>
KVARN_INLINE F blend(F x, F y) {
  if constexpr (h == 8) return {x.a, y.b};
  constexpr int lanes = h == 1 ? 0xaa : h == 2 ? 0xcc : 0xf0;
  if constexpr (h != 8) return {_mm256_blend_ps(x.a, y.a, lanes), _mm256_blend_ps(x.b, y.b, lanes)};
}
// -x in the lanes whose bit h is set
template <int h>
KVARN_INLINE F negate(F x) {
  const __m256 s = _mm256_set1_ps(-0.0f), z = _mm256_setzero_ps();
  if constexpr (h == 8) return {x.a, _mm256_xor_ps(x.b, s)};
  constexpr int lanes = h == 1 ? 0xaa : h == 2 ? 0xcc : 0xf0;
  const __m256 signs = _mm256_blend_ps(z, s, lanes);
  return {_mm256_xor_ps(x.a, signs), _mm256_xor_ps(x.b, signs)};
}
KVARN_INLINE float first(F x) { return _mm256_cvtss_f32(x.a); }

}  // namespace kvarn::KVARN_CPU
