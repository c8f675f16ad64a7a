// SPDX-License-Identifier: Apache-2.0
// One tile of K or of V in a CTA: where its numbers lie, and which thread takes which of them.
//
// The raw f16 values stay in shared memory in natural order [token][channel]. An encoder's row phase gives a row to
// `lanes` neighbouring lanes and keeps it in their registers, so that what is done to a row again and again costs no
// memory access and sums need two or three exchanges. Its column phase, the refit, reads the tile across. A barrier
// separates phases; nothing else does.
#pragma once

#include "cuda/encode_real.cuh"
#include "format/presets.hpp"

namespace kvarn::cuda {

enum class Side { kKeys, kValues };

template <int kThreads, Side kSide, int kTokens, int kHeadDim, int kBits>
struct EncodeShape {
  static constexpr Side side = kSide;
  static constexpr int threads = kThreads;  // of the CTA
  static constexpr int tokens = kTokens, head_dim = kHeadDim, bits = kBits;
  static constexpr int qmax = (1 << kBits) - 1;
  static constexpr int rows = kSide == Side::kKeys ? kHeadDim : kTokens;
  static constexpr int columns = kSide == Side::kKeys ? kTokens : kHeadDim;
  // Halves from token to token: 4 words beyond a multiple of 8, so that the 32 accesses of 8 tokens x 4 channels, 4 x 8
  // or the reverse fall into different banks.
  static constexpr int stride = kHeadDim + 8;

  // Row phase: lane q of a row holds columns q, q + lanes, ..
  static constexpr int lanes = columns > 128 || 8 * rows <= kThreads ? 8 : 4;
  static constexpr int held = columns / lanes;
  static constexpr int rows_at_once = kThreads / lanes;
  // Column phase: the other way round, lane p of a column takes rows p, p + row_lanes, ..
  static constexpr int row_lanes = 32 / lanes;
  static constexpr int columns_at_once = kThreads / row_lanes;

  // Numbers per column that the row phase reads as float4: those of a lane together, 4 words between lanes' blocks; of
  // a lane's, those that a partial sum adds first.
  static constexpr int column_words = lanes * (held + 4), partials = 32 / lanes;
  __device__ static constexpr int held_word(int i) { return i % partials * (columns / 32) + i / partials; }
  __device__ static constexpr int column_word(int column) {
    return column % lanes * (held + 4) + held_word(column / lanes);
  }
  __device__ static constexpr int at(int row, int column) {
    return kSide == Side::kKeys ? column * stride + row : row * stride + column;
  }
  static_assert(held % 4 == 0 && rows % row_lanes == 0 && columns % lanes == 0 && columns % 32 == 0 && rows % 32 == 0);
};

// What a thread is in the row phase: lane `q` of row `row`, then of row + rows_at_once.
template <class Shape>
struct RowLane {
  int q, row;
  __device__ RowLane() : q(threadIdx.x % Shape::lanes), row(threadIdx.x / Shape::lanes) {}
};
// What it is in the column phase.
template <class Shape>
struct ColumnLane {
  int p, column;
  __device__ ColumnLane()
      : p(threadIdx.x % 32 / Shape::lanes), column(threadIdx.x / 32 * Shape::lanes + threadIdx.x % Shape::lanes) {}
};

// Of a row: its grid, and the weight that its token has in the refit of a column.
struct alignas(16) Row {
  Real s, z, inverse, weight;
};

// Of the block of channels that feedback works on: y, later the errors, [channel][token]; B there, [column][row].
struct EncodeBlock {
  static constexpr int channels = 16;
  alignas(16) Real y[channels * format::kMaxPageTokens], diagonal[channels * channels];
};

// Shared memory of a CTA that encodes.
template <int kTokens, int kHeadDim>
struct EncodeMemory {
  static constexpr int kMost = kTokens > kHeadDim ? kTokens : kHeadDim;
  static constexpr int kColumnWords = kMost + 32;
  alignas(16) __half values[kTokens * (kHeadDim + 8)];  // at the end: the codes, as 16-bit integers
  Row row[kMost];
  alignas(16) Real column_inverse[kColumnWords], column_weight[kColumnWords];
  Real column[kMost];  // c
  Real k_norm[kTokens], v_norm[kTokens];
  Real deviation[kMost], row_best[kMost];  // of varnorm
  EncodeBlock block;                       // of feedback
};

template <class Shape>
__device__ inline Real raw_value(const __half* values, int row, int column) {
  return __half2float(values[Shape::at(row, column)]);
}

// The numbers of the lane's columns, from an array in the order of column_word.
template <class Shape>
__device__ inline void load_columns(const Real* from, int q, Real (&out)[Shape::held]) {
  const Real* words = from + q * (Shape::held + 4);
#pragma unroll
  for (int i = 0; i < Shape::held; ++i) out[i] = words[Shape::held_word(i)];
}

template <class Shape>
__device__ inline void load_row(const __half* values, int row, int q, Real (&out)[Shape::held]) {
#pragma unroll
  for (int i = 0; i < Shape::held; ++i) out[i] = raw_value<Shape>(values, row, q + Shape::lanes * i);
}

// Sum over the columns of a row, in the row phase; term(i) is of column q + lanes * i.
template <class Shape, class Term>
__device__ inline auto row_sums(const Term& term) {
  return sums<Shape::columns, Shape::lanes, 1>(term);
}
template <class Shape, class Term>
__device__ inline Real row_sum(const Term& term) {
  return sum<Shape::columns, Shape::lanes, 1>(term);
}
// Sum over the rows of a column, in the column phase; term(i) is of row p + row_lanes * i.
template <class Shape, class Term>
__device__ inline auto column_sums(const Term& term) {
  return sums<Shape::rows, Shape::row_lanes, Shape::lanes>(term);
}

// Lowest and highest of a row's values, in all its lanes.
template <class Shape>
__device__ inline void range(const Real (&x)[Shape::held], Real& low, Real& high) {
  low = high = x[0];
#pragma unroll
  for (int i = 1; i < Shape::held; ++i) low = smaller(low, x[i]), high = larger(high, x[i]);
#pragma unroll
  for (int o = Shape::lanes / 2; o >= 1; o /= 2) {
    low = smaller(low, __shfl_xor_sync(0xffffffffu, low.value, o));
    high = larger(high, __shfl_xor_sync(0xffffffffu, high.value, o));
  }
}

}  // namespace kvarn::cuda
