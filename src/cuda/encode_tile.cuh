// SPDX-License-Identifier: Apache-2.0
// One tile of K or of V in a CTA: where its numbers lie, and which thread takes which of them.
//
// The raw f16 values stay in shared memory. An encoder's row phase takes the rows of the tile as lines
// (encode_lines.cuh), its column phase, the refit, the columns. A barrier separates phases; nothing else does.
#pragma once

#include "cuda/encode_lines.cuh"
#include "format/presets.hpp"

namespace kvarn::cuda {

enum class Side { kKeys, kValues };

template <int kThreads, Side kSide, int kTokens, int kHeadDim, int kBits>
struct EncodeShape {
  static constexpr Side side = kSide;
  static constexpr int threads = kThreads;  // of the CTA
  static constexpr int tokens = kTokens, head_dim = kHeadDim, bits = kBits;
  static constexpr int qmax = (1 << kBits) - 1;
  using Rows = Lines<kThreads, kSide == Side::kValues, kTokens, kHeadDim>;
  using Columns = Lines<kThreads, kSide == Side::kKeys, kTokens, kHeadDim>;
  static constexpr int rows = Rows::count, columns = Columns::count, stride = Rows::stride;

  __device__ static constexpr int at(int row, int column) {
    return kSide == Side::kKeys ? column * stride + place_of(row) : row * stride + place_of(column);
  }
};

// Of a row: its grid, and the weight that its token has in the refit of a column.
struct alignas(16) Row {
  Real s, z, inverse, weight;
};

// What feedback works on: y of a block of channels, later the errors, [channel][token]; and B's columns of this block
// and of the next, [channel][column]. The last is left out where a CTA has no room for it.
template <int kTokens, int kHeadDim>
struct EncodeBlock {
  static constexpr int channels = 16, tokens = kHeadDim > 128 && kTokens > 64 ? 64 : kTokens;
  alignas(16) Real y[channels * tokens], columns[2][kHeadDim * channels];
};

// Shared memory of a CTA that encodes.
template <int kTokens, int kHeadDim>
struct EncodeMemory {
  static constexpr int kMost = kTokens > kHeadDim ? kTokens : kHeadDim;
  static constexpr int kColumnWords = kMost + 32;
  alignas(16) __half values[kTokens * (kHeadDim + 8)];  // at the end: the codes, as 16-bit integers
  Row row[kMost];
  alignas(16) Real column_inverse[kColumnWords], column_weight[kColumnWords];  // in the order of Rows::word
  Real column[kMost];                                                          // c
  Real k_norm[kTokens], v_norm[kTokens];
  Real deviation[kMost], row_best[kMost];  // of varnorm
  EncodeBlock<kTokens, kHeadDim> block;    // of feedback
};
// Of a CTA that has room for the columns of one block only: 96 KB at head_dim 256, where a CTA of an sm_86 has 99.
template <class Memory>
constexpr int least_bytes() {
  return static_cast<int>(sizeof(Memory) - sizeof(Memory{}.block.columns[0]));
}
inline constexpr int kLeastShared = 99 * 1024;

}  // namespace kvarn::cuda
