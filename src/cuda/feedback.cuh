// SPDX-License-Identifier: Apache-2.0
// K's codes with feedback (specification section 6) for one tile and one CTA. Bit-equal to codec/feedback.cpp.
//
// Channels go in blocks of 16, the last first. Of a block, a thread chooses all codes of one token, one after the
// other. Then its errors go into every earlier channel: a thread holds y of 4 tokens x 4 channels a few times in
// registers, so that a word from memory serves 16 multiplications, and a channel takes the errors in the order of the
// specification. The columns of B that a block needs come into shared memory while the block before is worked on.
// Tokens are independent: where the registers of a CTA are too few, it takes a part of the tile after the other.
#pragma once

#include "cuda/barrier.cuh"
#include "cuda/encode_tile.cuh"
#include "cuda/lifted.cuh"

namespace kvarn::cuda {

template <class Shape, class Memory>
struct Feedback {
  using Block = decltype(Memory::block);
  static constexpr int kBlock = Block::channels, kTokens = Block::tokens, kHeadDim = Shape::head_dim;
  static constexpr int kQuads = kHeadDim / 4, kTokenQuads = kTokens / 4, kClasses = Shape::threads / kTokenQuads;
  static constexpr int kHeldQuads = (kQuads + kClasses - 1) / kClasses;
  static_assert(kHeldQuads <= 4 && Shape::tokens % kTokens == 0 && kHeadDim % kBlock == 0);

  Memory& memory;
  const float* b;  // [channel][channel] of this head

  static __device__ Real negated_fma(Real a, Real x, Real y) { return __fmaf_rn(-a.value, x.value, y.value); }
  static __device__ float4 four(const Real* at) { return *reinterpret_cast<const float4*>(at); }

  // Asks for B's columns first .. first + 15, of the channels that need them.
  __device__ void fetch(int first, Real* columns) const {
    constexpr int kChunks = kBlock / 4;
#pragma unroll 1
    for (int i = here(); i < (first + kBlock) * kChunks; i += Shape::threads)
      copy_chunk(columns + 4 * i, b + i / kChunks * kHeadDim + first + i % kChunks * 4);
  }

  // Is there room to fetch the columns of the next block while this one is worked on?
  static __device__ bool has_both_columns() {
    if constexpr (sizeof(Memory) <= kLeastShared) return true;
    uint32_t bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes >= sizeof(Memory);
  }

  // The codes of a token in channels first .. first + 15, in place of the values; its errors in place of y. While a
  // code is chosen, all errors but its own go into the channel before, so that little is left to do once it is known.
  __device__ void choose(int token, Real* column, int first, const Real* columns) const {
    Real delta[kBlock];
    __half* const values = memory.values + token * Shape::stride + first;
    union {
      uint4 words[2];
      __half half[kBlock];
    } k;
    k.words[0] = reinterpret_cast<const uint4*>(values)[0], k.words[1] = reinterpret_cast<const uint4*>(values)[1];
    uint32_t codes[kBlock / 2] = {};
    const Real c = memory.column[token], inverse = memory.column_inverse[Shape::Rows::word(token)];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) delta[i] = column[i * kTokens];
    Real y = delta[kBlock - 1];
    Row row = memory.row[first + kBlock - 1];
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      Real before = 0.0f, weight = 0.0f;
      Row row_before{};
      if (i > 0) {
        before = delta[i - 1], row_before = memory.row[first + i - 1];
#pragma unroll
        for (int j = kBlock - 4; j + 3 >= i; j -= 4) {
          const float4 w = four(columns + (first + i - 1) * kBlock + j);
          const float weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int n = 3; n >= 0; --n) {
            if (j + n > i) before = negated_fma(weights[n], delta[j + n], before);
            if (j + n == i) weight = weights[n];
          }
        }
      }
      const int at = place_of(i);
      const Real code = lifted_code<Shape::qmax>(y * inverse, row.z, row.inverse);
      delta[i] = (times_code(code, row.s) + row.z) * c - Real(__half2float(k.half[at]));
      codes[at / 2] |= uint32_t{code_bits(code)} << (16 * (at % 2));
      y = negated_fma(weight, delta[i], before), row = row_before;
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) column[i * kTokens] = delta[i];
    reinterpret_cast<uint4*>(values)[0] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
    reinterpret_cast<uint4*>(values)[1] = make_uint4(codes[4], codes[5], codes[6], codes[7]);
  }

  using Held = Real[kHeldQuads][4][4];  // y: [][channel][token]

  // The first channel of a quad, four neighbours in shared memory; the i-th is which_of_eight(i) behind it.
  static __device__ int channel_of(int quad) { return quad / 2 * 8 + quad % 2 * 2; }

  // The errors of a block into the channels before it.
  __device__ void pass_on(int first, int token_quad, int of_class, const Real* columns, Held& y) const {
#pragma unroll 1
    for (int j = kBlock - 4; j >= 0; j -= 4) {
      float4 delta[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) delta[i] = four(memory.block.y + (j + i) * kTokens + 4 * token_quad);
#pragma unroll
      for (int r = 0; r < kHeldQuads; ++r) {
        const int channel = channel_of(of_class + kClasses * r);
        if (channel >= first) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 w = four(columns + (channel + which_of_eight(i)) * kBlock + j);
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
  }

  // Tokens start .. start + kTokens - 1. A thread's four lie kTokenQuads apart, so that neighbours' are neighbours.
  __device__ void pass(int start) const {
    const int thread = here(), token_quad = thread % kTokenQuads, of_class = thread / kTokenQuads;
    fetch(kHeadDim - kBlock, memory.block.columns[0]);
    Held y;
#pragma unroll
    for (int r = 0; r < kHeldQuads; ++r) {
      const int quad = of_class + kClasses * r;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const __half* row = memory.values + (start + token_quad + kTokenQuads * t) * Shape::stride;
        const bool there = kQuads % kClasses == 0 || quad < kQuads;
        const uint2 halves = there ? *reinterpret_cast<const uint2*>(row + 4 * quad) : uint2{};
        const float2 low = widen(halves.x), high = widen(halves.y);
        y[r][0][t] = low.x, y[r][1][t] = low.y, y[r][2][t] = high.x, y[r][3][t] = high.y;
      }
    }
    int buffer = 0;
    const bool both = has_both_columns();
#pragma unroll 1
    for (int first = kHeadDim - kBlock; first >= 0; first -= kBlock, buffer ^= both ? 1 : 0) {
#pragma unroll
      for (int r = 0; r < kHeldQuads; ++r) {
        const int channel = channel_of(of_class + kClasses * r) - first;  // in the block
        if (channel < 0 || channel >= kBlock) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          *reinterpret_cast<float4*>(memory.block.y + (channel + which_of_eight(i)) * kTokens + 4 * token_quad) =
              make_float4(y[r][i][0].value, y[r][i][1].value, y[r][i][2].value, y[r][i][3].value);
      }
      wait_for_chunks();
      __syncthreads();
      const Real* columns = memory.block.columns[buffer];
      if (first > 0 && both) fetch(first - kBlock, memory.block.columns[buffer ^ 1]);
      if (thread < kTokens)
        choose(start + thread / 4 + kTokenQuads * (thread % 4), memory.block.y + thread, first, columns);
      __syncthreads();
      pass_on(first, token_quad, of_class, columns, y);
      __syncthreads();  // the errors were read, and the columns
      if (first > 0 && !both) fetch(first - kBlock, memory.block.columns[0]);
    }
  }

  // Values and the final grid in, codes out; begins and ends with the caller's barriers.
  __device__ void run() const {
#pragma unroll 1
    for (int start = 0; start < Shape::tokens; start += kTokens) pass(start);
  }
};

}  // namespace kvarn::cuda
