// SPDX-License-Identifier: Apache-2.0
// What the order of the codes costs a CPU: the score product of one 128 x 128 tile of 4-bit K codes with 4 columns in
// two signed-byte limbs, from our fragment order and from the order of the GPU prototype ("design A"), both with
// AVX-512 VNNI. The answers are compared with plain loops first. docs/fragment-order.md has the results.
#include <benchmark/benchmark.h>
#include <immintrin.h>

#include <cstring>
#include <random>
#include <vector>

#include "format/fragment.hpp"

namespace {

constexpr int kTokens = 128, kChannels = 128, kColumns = 4, kLimbs = 2;

struct Problem {
  std::vector<uint8_t> codes = std::vector<uint8_t>(kTokens * kChannels);
  alignas(64) int8_t q[kColumns][kLimbs][kChannels];
  std::vector<int32_t> expected = std::vector<int32_t>(kColumns * kLimbs * kTokens);

  Problem() {
    std::mt19937 random(1);
    for (uint8_t& c : codes) c = static_cast<uint8_t>(random() % 16);
    for (auto& column : q)
      for (auto& limb : column)
        for (int8_t& x : limb) x = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    for (int c = 0; c < kColumns; ++c)
      for (int l = 0; l < kLimbs; ++l)
        for (int t = 0; t < kTokens; ++t) {
          int sum = 0;
          for (int d = 0; d < kChannels; ++d) sum += codes[static_cast<size_t>(t * kChannels + d)] * q[c][l][d];
          expected[static_cast<size_t>((c * kLimbs + l) * kTokens + t)] = sum;
        }
  }
};

// vpdpbusd in place: gcc 12 copies the accumulator around the intrinsic.
[[gnu::always_inline]] inline __m512i dot(__m512i sum, __m512i codes, __m512i q) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(q));
  return sum;
}

// Bytes 0 1 2 3 of every word as 0 2 1 3, which both orders want of their operand.
[[gnu::always_inline]] inline __m512i word_order(__m512i x) {
  return _mm512_shuffle_epi8(
      x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)));
}

// Ours: a line is 16 tokens x 4 channels in each nibble; the lanes are tokens, nothing is left to reduce.
struct Ours {
  alignas(64) uint8_t bytes[8192] = {};
  alignas(64) int8_t q[kColumns * kLimbs][kChannels];
  explicit Ours(const Problem& p) {
    const auto plane = kvarn::format::make_plane(kTokens, kChannels, 4, 0);
    for (int t = 0; t < kTokens; ++t)
      for (int d = 0; d < kChannels; ++d) {
        const auto at = kvarn::format::code_place(plane, t, d);
        bytes[at.byte] =
            static_cast<uint8_t>(bytes[at.byte] | p.codes[static_cast<size_t>(t * kChannels + d)] << at.bit);
      }
  }
  void order(const Problem& p) {  // part of a product: the operand's bytes as the word's
    for (int c = 0; c < kColumns * kLimbs; ++c)
      for (int d = 0; d < kChannels; d += 64)
        _mm512_store_si512(q[c] + d, word_order(_mm512_load_si512(&p.q[c / kLimbs][c % kLimbs][d])));
  }
  void run(const Problem& p, int32_t* out) {
    order(p);
    const __m512i mask = _mm512_set1_epi8(15);
    for (int block = 0; block < 4; ++block) {
      __m512i sums[2][kColumns * kLimbs];
      for (auto& half : sums)
        for (__m512i& s : half) s = _mm512_setzero_si512();
      for (int step = 0; step < 32; step += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __m512i line = _mm512_load_si512(bytes + 64 * (block * 32 + step + i));
          if (kvarn::format::halves_exchanged(i)) line = _mm512_shuffle_i64x2(line, line, 0x4e);
          const __m512i low = _mm512_and_si512(line, mask), high = _mm512_and_si512(_mm512_srli_epi32(line, 4), mask);
#pragma GCC unroll 8
          for (int c = 0; c < kColumns * kLimbs; ++c) {
            int32_t quad;
            std::memcpy(&quad, &q[c][4 * (step + i)], 4);
            sums[0][c] = dot(sums[0][c], low, _mm512_set1_epi32(quad));
            sums[1][c] = dot(sums[1][c], high, _mm512_set1_epi32(quad));
          }
        }
#pragma GCC unroll 8
      for (int c = 0; c < kColumns * kLimbs; ++c) {
        _mm512_storeu_si512(out + c * kTokens + 32 * block, sums[0][c]);
        _mm512_storeu_si512(out + c * kTokens + 32 * block + 16, sums[1][c]);
      }
    }
  }
};

// Design A (t = 16 r + 2 mt + h, d = 32 tig + 4 ks + 2 khi + lo): byte = 1024 mt + 512 (ks / 4) + 16 (4 r + tig) + 4
// (ks % 4), bit = 16 lo + 8 h + 4 khi. 64 bytes are two tokens x 64 channels, interleaved by bytes: 7 operations sort
// them into two vectors, the lanes are channels, and every token's 16 lanes must be summed at the end.
struct DesignA {
  alignas(64) uint8_t bytes[8192] = {};
  alignas(64) int8_t q[kColumns * kLimbs][2][64];  // operand in the lanes' order, per half of ks
  explicit DesignA(const Problem& p) {
    for (int t = 0; t < kTokens; ++t)
      for (int d = 0; d < kChannels; ++d) {
        const int r = t / 16, mt = t % 16 / 2, h = t % 2, tig = d / 32, ks = d % 32 / 4, khi = d >> 1 & 1, lo = d & 1;
        const int byte = 1024 * mt + 512 * (ks / 4) + 16 * (4 * r + tig) + 4 * (ks % 4),
                  bit = 16 * lo + 8 * h + 4 * khi;
        bytes[byte + bit / 8] =
            static_cast<uint8_t>(bytes[byte + bit / 8] | p.codes[static_cast<size_t>(t * kChannels + d)] << bit % 8);
      }
  }
  void order(const Problem& p) {  // part of a product: lane (tig, ks) takes channels 32 tig + 4 (4 half + ks) and on
    for (int c = 0; c < kColumns * kLimbs; ++c)
      for (int half = 0; half < 2; ++half) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        const int8_t* from = p.q[c / kLimbs][c % kLimbs];
        const __m512i words =
            _mm512_permutex2var_epi32(_mm512_load_si512(from), _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * half)),
                                      _mm512_load_si512(from + 64));
        _mm512_store_si512(q[c][half], word_order(words));
      }
  }
  // The lane sums of 16 vectors at once, of x[i] in lane i: 15 times two blends, an exchange and an addition.
  template <int h>
  [[gnu::always_inline]] static __m512i pair(__m512i a, __m512i b) {
    constexpr __mmask16 lanes = h == 1 ? 0xaaaa : h == 2 ? 0xcccc : h == 4 ? 0xf0f0 : 0xff00;
    const __m512i other = _mm512_mask_blend_epi32(lanes, b, a);
    const __m512i exchanged = h == 1   ? _mm512_shuffle_epi32(other, _MM_PERM_CDAB)
                              : h == 2 ? _mm512_shuffle_epi32(other, _MM_PERM_BADC)
                              : h == 4 ? _mm512_shuffle_i32x4(other, other, 0xb1)
                                       : _mm512_shuffle_i32x4(other, other, 0x4e);
    return _mm512_add_epi32(_mm512_mask_blend_epi32(lanes, a, b), exchanged);
  }
  static __m512i sum_each(const __m512i* x) {
    __m512i y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) y[i] = pair<8>(x[i], x[i + 8]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[i] = pair<4>(y[i], y[i + 4]);
    return pair<1>(pair<2>(y[0], y[2]), pair<2>(y[1], y[3]));
  }
  void run(const Problem& p, int32_t* out) {
    order(p);
    const __m512i even_low = _mm512_set1_epi32(0x000f000f), even_high = _mm512_set1_epi32(0x0f000f00);
    for (int r = 0; r < 8; ++r) {
      __m512i sums[kColumns * kLimbs][16];  // 16 r + 2 mt + h: adjacent tokens
      for (int mt = 0; mt < 8; ++mt)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i w = _mm512_load_si512(bytes + 1024 * mt + 512 * half + 64 * r);
          const __m512i tokens[2] = {
              _mm512_or_si512(_mm512_and_si512(w, even_low), _mm512_and_si512(_mm512_slli_epi32(w, 4), even_high)),
              _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(w, 8), even_low),
                              _mm512_and_si512(_mm512_srli_epi32(w, 4), even_high))};
#pragma GCC unroll 8
          for (int c = 0; c < kColumns * kLimbs; ++c)
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h)
              sums[c][2 * mt + h] =
                  dot(half ? sums[c][2 * mt + h] : _mm512_setzero_si512(), tokens[h], _mm512_load_si512(q[c][half]));
        }
      for (int c = 0; c < kColumns * kLimbs; ++c) _mm512_storeu_si512(out + c * kTokens + 16 * r, sum_each(sums[c]));
    }
  }
};

template <class Order>
void product(benchmark::State& state) {
  const Problem problem;
  Order order(problem);
  std::vector<int32_t> out(problem.expected.size(), -1);
  order.run(problem, out.data());
  if (out != problem.expected) return state.SkipWithError("wrong sums");
  for (auto _ : state) {
    order.run(problem, out.data());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(product<Ours>)->Name("scores/ours");
BENCHMARK(product<DesignA>)->Name("scores/design_a");

}  // namespace

BENCHMARK_MAIN();
