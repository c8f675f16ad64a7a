// SPDX-License-Identifier: Apache-2.0
// Lines of a tile in shared memory: a token over its channels, or a channel over the tile's tokens. A few lanes of a
// warp hold a line in their registers, so that what is done to it again and again costs no memory access and sums need
// few exchanges.
//
// The tile lies [token][place of a channel]. A lane of an MMA's operand gets two neighbours of eight values; it has to
// hold elements e and e + 4 of the line, for the sums' sake. So these two channels are neighbours in a token's row, and
// of tokens the lanes name such rows.
#pragma once

#include "cuda/encode_real.cuh"
#include "cuda/machine.cuh"

namespace kvarn::cuda {

// Where a channel lies in the row of its token, and which of eight lies at a place.
__device__ constexpr int place_of(int channel) { return (channel & ~7) | (channel & 3) << 1 | (channel >> 2 & 1); }
__device__ constexpr int which_of_eight(int place) { return place >> 1 | (place & 1) << 2; }

// The thread, asked for anew: else the compiler keeps what it once worked out from it, and spills it.
__device__ inline unsigned here() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

template <int kThreads, bool kOfTokens, int kTokens, int kHeadDim>
struct Lines {
  static constexpr int count = kOfTokens ? kTokens : kHeadDim, length = kOfTokens ? kHeadDim : kTokens;
  // Halves from token to token: 4 words beyond a multiple of 8, so that eight rows fall into different banks.
  static constexpr int stride = kHeadDim + 8;
  static constexpr int lanes = length > 128 ? 8 : 4, held = length / lanes, partials = 32 / lanes;
  static constexpr int of_warp = 32 / lanes, at_once = kThreads / lanes;
  // What one load brings of a line: 8 values a lane; and how far the next are.
  static constexpr int group = 8 * lanes, group_halves = kOfTokens ? group : group * stride;
  static_assert(count % of_warp == 0 && length % group == 0 && (kOfTokens || lanes == 4));

  int lane, in_warp;  // of the line; which of the warp's lines
  __device__ Lines() {
    const int eighth = here() % 32 / 4;
    lane = eighth / of_warp * 4 + here() % 4;
    in_warp = kOfTokens ? eighth % of_warp : which_of_eight(eighth);
  }

  // body(first) for all lines; those of the warp are first .. first + of_warp - 1, this lane's is first + in_warp.
  template <int kStep = at_once, class Body>
  __device__ static void for_each(const Body& body) {
    const int mine = here() / 32 * of_warp;
#pragma unroll 1
    for (int base = 0; base < count; base += kStep) {
      if (count % kStep != 0 && base + mine >= count) break;
      body(base + mine);
    }
  }

  // A lane's i-th element of the line is start() + step(i).
  __device__ int start() const { return lane / 4 * 8 + lane % 4; }
  __device__ static constexpr int step(int i) { return lanes == 4 ? 4 * i : i / 2 * 16 + i % 2 * 4; }

  // Of numbers that lie as the lanes read them, as float4: those of a lane together, 4 words between lanes' blocks; of
  // a lane's, those that a partial sum adds first.
  static constexpr int lane_words = held + 4;
  __device__ static constexpr int held_word(int i) { return i % partials * (length / 32) + i / partials; }
  __device__ static constexpr int word(int element) {
    return lanes == 4
               ? element % 4 * lane_words + held_word(element / 4)
               : (element / 8 % 2 * 4 + element % 4) * lane_words + held_word(element / 16 * 2 + element / 4 % 2);
  }

  // Where this thread's row of the first group's four matrices lies.
  __device__ const __half* matrices(const __half* values, int first) const {
    const int matrix = here() % 32 / 8, row = here() % 8;
    return kOfTokens ? values + (first + row % of_warp) * stride + (matrix * (lanes / 4) + row / of_warp) * 8
                     : values + (matrix * 8 + which_of_eight(row)) * stride + first;
  }
  // A group's values.
  __device__ static void load(const __half* matrices, Real* x) {
    uint32_t pairs[4];
    load_matrices<!kOfTokens>(pairs, matrices);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen(pairs[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
  __device__ void load_all(const __half* values, int first, Real (&x)[held]) const {
    const __half* from = matrices(values, first);
#pragma unroll
    for (int i = 0; i < held / 8; ++i) load(from + i * group_halves, x + 8 * i);
  }

  // SUM of specification section 5: part(i) is the partial sum of the lane's elements i, i + partials, ..; all lanes of
  // the line get the result. Depth first, since that needs the fewest registers.
  template <class Part>
  __device__ static auto fold(const Part& part) {
    const auto sixteen = [&](int i) { return part(i) + part(i + partials / 2); };
    const auto eight = [&](int i) {
      const auto s = sixteen(i);
      if constexpr (lanes == 4)
        return s + sixteen(i + 2);
      else
        return s + of_lane(s, 16);
    };
    auto sum = eight(0) + eight(1);
    sum = sum + of_lane(sum, 2);
    return sum + of_lane(sum, 1);
  }
  // term(i) is of the lane's i-th element.
  template <class Term>
  __device__ static auto sums(const Term& term) {
    return fold([&](int first) {
      auto s = term(first);
#pragma unroll
      for (int i = 1; i < held / partials; ++i) s = s + term(first + i * partials);
      return s;
    });
  }
  template <class Term>
  __device__ static Real sum(const Term& term) {
    return sums([&](int i) { return Sums<1>{{term(i)}}; }).of[0];
  }

  // Lowest and highest, in all lanes of the line; four chains side by side.
  __device__ static void range(const Real (&x)[held], Real& low, Real& high) {
    Real lows[4], highs[4];
#pragma unroll
    for (int i = 0; i < held; ++i) {
      lows[i % 4] = i < 4 ? x[i] : smaller(lows[i % 4], x[i]);
      highs[i % 4] = i < 4 ? x[i] : larger(highs[i % 4], x[i]);
    }
    low = smaller(smaller(lows[0], lows[1]), smaller(lows[2], lows[3]));
    high = larger(larger(highs[0], highs[1]), larger(highs[2], highs[3]));
#pragma unroll
    for (int o = lanes == 4 ? 2 : 16; o >= 1; o = o == 16 ? 2 : o / 2) {
      low = smaller(low, __shfl_xor_sync(0xffffffffu, low.value, o));
      high = larger(high, __shfl_xor_sync(0xffffffffu, high.value, o));
    }
  }

 private:
  template <int kCount>
  __device__ static Sums<kCount> of_lane(Sums<kCount> s, int distance) {
#pragma unroll
    for (Real& x : s.of) x = __shfl_xor_sync(0xffffffffu, x.value, distance);
    return s;
  }
};

}  // namespace kvarn::cuda
