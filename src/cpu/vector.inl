// SPDX-License-Identifier: Apache-2.0
// What every verb uses: sums in the order of specification section 5, dtypes, 2^x.
namespace kvarn::KVARN_CPU {

KVARN_INLINE F clamp(F x, F low, F high) { return min(max(x, low), high); }

// s[l] + s[l + o] for o = 8, 4, 2, 1: the last four steps of SUM.
KVARN_INLINE float sum_lanes(F x) {
  x = x + exchange<8>(x);
  x = x + exchange<4>(x);
  x = x + exchange<2>(x);
  return first(x + exchange<1>(x));
}
// sum_lanes of 16 vectors at once, the sum of x[i] in lane i: the same additions, each for 16 vectors.
template <int h>
KVARN_INLINE F sum_pair(F a, F b) {
  return blend<h>(a, exchange<h>(b)) + blend<h>(exchange<h>(a), b);
}
KVARN_INLINE F sum_each(const F* x) {
  F y[8];
  KVARN_UNROLL
  for (int i = 0; i < 8; ++i) y[i] = sum_pair<8>(x[i], x[i + 8]);
  KVARN_UNROLL
  for (int i = 0; i < 4; ++i) y[i] = sum_pair<4>(y[i], y[i + 4]);
  return sum_pair<1>(sum_pair<2>(y[0], y[2]), sum_pair<2>(y[1], y[3]));
}
KVARN_INLINE float max_lanes(F x) {
  x = max(x, exchange<8>(x));
  x = max(x, exchange<4>(x));
  x = max(x, exchange<2>(x));
  return first(max(x, exchange<1>(x)));
}

// SUM over n adjacent values, 16 at a time: blocks 0, 2, .. are partials 0 to 15, blocks 1, 3, .. partials 16 to 31.
template <class Term>
KVARN_INLINE float sum_blocks(int n, Term term) {
  F even = term(0), odd = term(16);
  for (int i = 32; i < n; i += 32) {
    even = even + term(i);
    if (i + 16 < n) odd = odd + term(i + 16);
  }
  return sum_lanes(even + odd);
}

// SUM over columns j for 16 rows at once, N sums in one pass. The partials are visited in bit-reversed order, so that
// the tree of section 5 becomes a stack of five.
template <int N>
struct Sums {
  F v[N];
};
template <int N, class Term>
KVARN_INLINE Sums<N> sum_columns(int n, Term term) {
  static constexpr uint8_t kReversed[32] = {0, 16, 8, 24, 4, 20, 12, 28, 2, 18, 10, 26, 6, 22, 14, 30,
                                            1, 17, 9, 25, 5, 21, 13, 29, 3, 19, 11, 27, 7, 23, 15, 31};
  Sums<N> stack[6];
  int depth = 0;
  for (int k = 0; k < 32; ++k) {
    Sums<N> part = term(static_cast<int>(kReversed[k]));
    for (int j = kReversed[k] + 32; j < n; j += 32) {
      const Sums<N> next = term(j);
      for (int s = 0; s < N; ++s) part.v[s] = part.v[s] + next.v[s];
    }
    for (int carry = k; carry & 1; carry >>= 1) {
      --depth;
      for (int s = 0; s < N; ++s) part.v[s] = stack[depth].v[s] + part.v[s];
    }
    stack[depth++] = part;
  }
  return stack[0];
}

KVARN_INLINE F f16_range(F x) { return clamp(x, set(-65504.0f), set(65504.0f)); }
// f16(x) of the specification, widened again.
KVARN_INLINE F round_f16(F x) {
  uint16_t halves[16];
  store_f16(halves, f16_range(x));
  return load_f16(halves);
}

KVARN_INLINE F load_any(const void* p, kvarn_dtype dtype, int i) {
  if (dtype == KVARN_FLOAT16) return load_f16(static_cast<const uint16_t*>(p) + i);
  if (dtype == KVARN_BFLOAT16) return load_u16_high(static_cast<const uint16_t*>(p) + i);
  return load(static_cast<const float*>(p) + i);
}

KVARN_INLINE void store_any(F x, void* p, kvarn_dtype dtype, int i) {
  if (dtype == KVARN_FLOAT16) return store_f16(static_cast<uint16_t*>(p) + i, x);
  if (dtype == KVARN_FLOAT32) return store(static_cast<float*>(p) + i, x);
  // bf16, nearest even: add 0x7fff and the bit that stays last. NaN keeps its upper half, made quiet.
  const I bits = as_int(x), upper = shift_right(bits, 16);
  const I rounded = shift_right(add(bits, add(bit_and(upper, set(1)), set(0x7fff))), 16);
  const F out = select(ordered(x), as_float(rounded), as_float(bit_or(upper, set(0x40))));
  store_u16(static_cast<uint16_t*>(p) + i, as_int(out));
}

// 2^x for x <= 0, flushed to 0 below -126. Relative error 2e-7: the series of 2^f for |f| <= 1/2.
KVARN_INLINE F exp2_negative(F x) {
  const F n = rint(max(x, set(-127.0f))), f = max(x, set(-127.0f)) - n;
  F p = set(1.53533614e-4f);
  p = p * f + set(1.33988760e-3f);
  p = p * f + set(9.61843785e-3f);
  p = p * f + set(5.55032887e-2f);
  p = p * f + set(2.40226473e-1f);
  p = p * f + set(6.93147182e-1f);
  p = p * f + set(1.0f);
  const F scale = as_float(shift_left(add(to_int(n), set(127)), 23));
  return select(less(x, set(-126.0f)), set(0.0f), p * scale);
}
KVARN_INLINE float exp2_negative(float x) { return first(exp2_negative(set(x))); }

}  // namespace kvarn::KVARN_CPU
