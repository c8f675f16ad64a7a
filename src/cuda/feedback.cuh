// SPDX-License-Identifier: Apache-2.0
// K's codes with feedback (specification section 6) for one tile and one CTA. Bit-equal to codec/feedback.cpp.
//
// Channels go in blocks of 16, the last first. Of a block, a thread chooses all codes of one token, one after the
// other. Then its errors go into every earlier channel: a thread holds y of 4 tokens x 4 channels twice in registers,
// so that a word from memory serves 16 multiplications, and a channel takes the errors in the order of the
// specification. Tokens are independent: where the registers of a CTA are too few, it takes a part of the tile after
// the other.
#pragma once

#include "cuda/encode_tile.cuh"
#include "cuda/lifted.cuh"

namespace kvarn::cuda {

template <class Shape, class Memory>
struct Feedback {
  static constexpr int kBlock = EncodeBlock::channels, kQuads = Shape::head_dim / 4, kHeldQuads = 2;
  static constexpr int kRoom = Shape::threads * kHeldQuads * 16 / Shape::head_dim;  // tokens
  static constexpr int kTokens = kRoom >= Shape::tokens ? Shape::tokens : kRoom >= 64 ? 64 : 32;
  static constexpr int kTokenQuads = kTokens / 4, kClasses = Shape::threads / kTokenQuads;
  static_assert(kRoom >= kTokens && kHeldQuads * kClasses >= kQuads && Shape::tokens % kTokens == 0);
  static_assert(Shape::threads >= kBlock * kBlock && Shape::threads >= kTokens && Shape::head_dim % kBlock == 0);

  Memory& memory;
  const float* b;  // [channel][channel] of this head

  static __device__ Real negated_fma(Real a, Real x, Real y) { return __fmaf_rn(-a.value, x.value, y.value); }
  static __device__ float4 four(const Real* at) { return *reinterpret_cast<const float4*>(at); }

  // The codes of a token in channels first .. first + 15, in place of the values; their errors in place of y.
  __device__ void choose(int token, int place, int first) const {
    Real y[kBlock], *const column = memory.block.y + place;
    __half* const values = memory.values + token * Shape::stride + first;
    union {
      uint4 words[2];
      __half half[kBlock];
    } k;
    k.words[0] = reinterpret_cast<const uint4*>(values)[0], k.words[1] = reinterpret_cast<const uint4*>(values)[1];
    uint32_t codes[kBlock / 2] = {};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) y[i] = column[i * kTokens];
    const Real c = memory.column[token], inverse = memory.column_inverse[Shape::column_word(token)];
#pragma unroll
    for (int j = kBlock - 1; j >= 0; --j) {
      const Row row = memory.row[first + j];
      const Real code = lifted_code<Shape::qmax>(y[j] * inverse, row.z, row.inverse);
      const Real delta = (times_code(code, row.s) + row.z) * c - Real(__half2float(k.half[j]));
      column[j * kTokens] = delta;
      codes[j / 2] |= uint32_t{code_bits(code)} << (16 * (j % 2));
#pragma unroll
      for (int i = 0; i < j; ++i) y[i] = negated_fma(memory.block.diagonal[j * kBlock + i], delta, y[i]);
    }
    reinterpret_cast<uint4*>(values)[0] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
    reinterpret_cast<uint4*>(values)[1] = make_uint4(codes[4], codes[5], codes[6], codes[7]);
  }

  // Tokens start .. start + kTokens - 1.
  __device__ void pass(int start) const {
    const int thread = threadIdx.x, token_quad = thread % kTokenQuads, of_class = thread / kTokenQuads;
    Real y[kHeldQuads][4][4];  // [][channel][token]
#pragma unroll
    for (int r = 0; r < kHeldQuads; ++r) {
      const int quad = of_class + kClasses * r;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const __half* at = memory.values + (start + 4 * token_quad + t) * Shape::stride + 4 * quad;
#pragma unroll
        for (int i = 0; i < 4; ++i) y[r][i][t] = quad < kQuads ? __half2float(at[i]) : 0.0f;
      }
    }
#pragma unroll 1
    for (int first = Shape::head_dim - kBlock; first >= 0; first -= kBlock) {
#pragma unroll
      for (int r = 0; r < kHeldQuads; ++r) {
        const int channel = 4 * (of_class + kClasses * r) - first;  // in the block
        if (channel < 0 || channel >= kBlock) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          *reinterpret_cast<float4*>(memory.block.y + (channel + i) * kTokens + 4 * token_quad) =
              make_float4(y[r][i][0].value, y[r][i][1].value, y[r][i][2].value, y[r][i][3].value);
      }
      if (thread < kBlock * kBlock) {
        const int i = thread / kBlock, j = thread % kBlock;
        memory.block.diagonal[j * kBlock + i] = j > i ? b[(first + i) * Shape::head_dim + first + j] : 0.0f;
      }
      __syncthreads();
      if (thread < kTokens) choose(start + thread, thread, first);
      __syncthreads();
#pragma unroll 1
      for (int j = kBlock - 4; j >= 0; j -= 4) {
        float4 delta[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) delta[i] = four(memory.block.y + (j + i) * kTokens + 4 * token_quad);
#pragma unroll
        for (int r = 0; r < kHeldQuads; ++r) {
          const int channel = 4 * (of_class + kClasses * r);
          if (channel >= first) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float4 w = *reinterpret_cast<const float4*>(b + (channel + i) * Shape::head_dim + first + j);
            const float weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int n = 3; n >= 0; --n) {
              y[r][i][0] = negated_fma(weights[n], delta[n].x, y[r][i][0]);
              y[r][i][1] = negated_fma(weights[n], delta[n].y, y[r][i][1]);
              y[r][i][2] = negated_fma(weights[n], delta[n].z, y[r][i][2]);
              y[r][i][3] = negated_fma(weights[n], delta[n].w, y[r][i][3]);
            }
          }
        }
      }
      __syncthreads();  // the errors were read
    }
  }

  // Values and the final grid in, codes out; begins and ends with the caller's barriers.
  __device__ void run() const {
#pragma unroll 1
    for (int start = 0; start < Shape::tokens; start += kTokens) pass(start);
  }
};

}  // namespace kvarn::cuda
