// SPDX-License-Identifier: Apache-2.0
// What the encoder `weighted` takes from the norms of tokens: their importance, and the scales of K's columns
// (specification section 6).
#pragma once

#include "cuda/encode_tile.cuh"

namespace kvarn::cuda {

// norm[t] = SUM_d x*x of every token. Ends without a barrier.
template <int kThreads, int kTokens, int kHeadDim>
__device__ inline void token_norms(const __half* values, Real* norm) {
  using Tokens = Lines<kThreads, true, kTokens, kHeadDim>;
  const Tokens at;
  Tokens::for_each([&](int first) {
    Real x[Tokens::held];
    at.load_all(values, first, x);
    const Real squares = Tokens::sum([&](int i) { return x[i] * x[i]; });
    if (at.lane == 0) norm[first + at.in_warp] = squares;
  });
}

// (SUM_t norm) / G, by every warp for itself.
template <int kTokens>
__device__ inline Real mean_norm(const Real* norm) {
  const int lane = threadIdx.x % 32;
  return warp_sum<kTokens>([&](int i) { return norm[lane + 32 * i]; }) / Real(static_cast<float>(kTokens));
}

// The importance of tokens, from the ratio of the mean norm to theirs.
inline constexpr float kTiny = 0x1p-40f;
__device__ inline Real key_weight(Real rk, Real rv) { return clamp(rv * rk, 1.0f, 4096.0f); }
__device__ inline Real value_weight(Real rv) { return smaller(rv * rv * rv, 131072.0f); }

// c of K: the norm of each token over the power of two that is their mean in the logarithm. Threads 0 .. G-1.
template <class Shape>
__device__ inline void token_norm(const Real* norm, Real* c) {
  constexpr int kCount = Shape::columns / 32;
  const auto root = [&](int t) { return square_root(norm[t] / Real(static_cast<float>(Shape::rows))); };
  int exponents = 0;
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {
    const int e = static_cast<int>(__float_as_uint(root(threadIdx.x % 32 + 32 * i).value) >> 23) - 127;
    exponents += e > -24 ? e : -24;
  }
#pragma unroll
  for (int o = 16; o >= 1; o /= 2) exponents += __shfl_xor_sync(0xffffffffu, exponents, o);
  const int twice = 2 * exponents + Shape::columns, n = 2 * Shape::columns;
  const int mean = twice >= 0 ? twice / n : -((n - 1 - twice) / n);  // floor
  const Real scale = __uint_as_float(static_cast<uint32_t>(127 - mean) << 23);
  const int t = threadIdx.x;
  if (t < Shape::columns) c[t] = f16(clamp(root(t) * scale, 0x1p-8f, 0x1p8f));
}

}  // namespace kvarn::cuda
