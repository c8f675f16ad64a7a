// SPDX-License-Identifier: Apache-2.0
// An encoded tile into its record: the codes in fragment order (format/fragment.hpp), the vectors as f16.
#pragma once

#include "cuda/encode_tile.cuh"
#include "cuda/shape.hpp"

namespace kvarn::cuda {

// The codes of four adjacent columns of the code matrix, as the bytes 0 2 1 3 of a word. K's matrix is
// [token][channel], V's [channel][token]; the codes lie [token][place of the channel] as 16-bit integers.
template <class Shape>
__device__ inline uint32_t four_codes(const uint16_t* codes, int matrix_row, int matrix_column) {
  if constexpr (Shape::side == Side::kKeys) {
    // Eight channels: pairs 0 4, 1 5, 2 6, 3 7.
    const uint4 pairs = *reinterpret_cast<const uint4*>(codes + matrix_row * Shape::stride + matrix_column / 8 * 8);
    return __byte_perm(pairs.x + (pairs.z << 8), pairs.y + (pairs.w << 8), matrix_column & 4 ? 0x7632 : 0x5410);
  } else {
    const uint16_t* at = codes + matrix_column * Shape::stride + place_of(matrix_row);
    const uint32_t c0 = at[0], c1 = at[Shape::stride], c2 = at[2 * Shape::stride], c3 = at[3 * Shape::stride];
    return c0 + (c2 << 8) + (c1 << 16) + (c3 << 24);
  }
}
static_assert(format::word_byte(1) == 2 && format::word_byte(2) == 1);

// The planes of a tile's code matrix.
template <class Shape>
struct CodePlanes {
  static constexpr bool keys = Shape::side == Side::kKeys;
  static constexpr format::Planes planes =
      format::make_planes(keys ? Shape::tokens : Shape::head_dim, keys ? Shape::head_dim : Shape::tokens, Shape::bits);
  static constexpr int bytes[2] = {static_cast<int>(planes.plane[0].bytes()),
                                   static_cast<int>(planes.plane[1].bytes())};
};
// In the lines of which steps the halves are exchanged.
__device__ inline int exchanged(int step) { return step & 2 ? format::kLineRows / 2 : 0; }
static_assert(!format::halves_exchanged(4) && !format::halves_exchanged(1) && format::halves_exchanged(2) &&
              format::halves_exchanged(3));
static_assert(format::kLineBytes == 4 * format::kLineRows && format::kWordColumns == 4);

// Plane kPlane of the matrix, a 32-bit word at a time.
template <class Shape, int kPlane>
__device__ inline void pack_plane(const uint16_t* codes, uint8_t* out) {
  constexpr format::Plane kIs = CodePlanes<Shape>::planes.plane[kPlane];
  constexpr int kWords = CodePlanes<Shape>::bytes[kPlane] / 4;
  constexpr uint32_t kMask = 0x01010101u * ((1u << kIs.width) - 1);
#pragma unroll 2
  for (int w = threadIdx.x; w < kWords; w += Shape::threads) {
    const int line = w / format::kLineRows, block = line / kIs.steps, step = line % kIs.steps;
    const int slot = w % format::kLineRows ^ exchanged(step);
    const int row = block * format::kLineRows * kIs.row_fields + slot;
    const int column = step * format::kWordColumns * kIs.column_fields;
    uint32_t word = 0;
#pragma unroll
    for (int fc = 0; fc < kIs.column_fields; ++fc) {
#pragma unroll
      for (int fr = 0; fr < kIs.row_fields; ++fr) {
        uint32_t four = four_codes<Shape>(codes, row + format::kLineRows * fr, column + format::kWordColumns * fc);
        if constexpr (Shape::bits != kIs.width) four = four >> kIs.shift & kMask;  // one of two planes
        word += four << (kIs.width * (fc * kIs.row_fields + fr));
      }
    }
    reinterpret_cast<uint32_t*>(out)[w] = word;
  }
}

// Shape is the record's, Is the tile's; unit is that of the rows' s.
template <class Shape, class Is, class Memory>
__device__ inline void write_record(const Memory& memory, float unit, uint8_t* record) {
  constexpr bool kKeys = Is::side == Side::kKeys;
  constexpr int kCodes = kKeys ? Shape::layout.k_codes : Shape::layout.v_codes;
  constexpr int kScale = kKeys ? Shape::layout.k_scale : Shape::layout.v_scale;
  constexpr int kZero = kKeys ? Shape::layout.k_zero : Shape::layout.v_zero;
  constexpr int kColumn = kKeys ? Shape::layout.k_token : Shape::layout.v_channel;
  const uint16_t* codes = reinterpret_cast<const uint16_t*>(memory.values);
  pack_plane<Is, 0>(codes, record + kCodes);
  if constexpr (Is::bits == 3) pack_plane<Is, 1>(codes, record + kCodes + CodePlanes<Is>::bytes[0]);

  const int i = threadIdx.x;
  if (i < Is::rows) {
    reinterpret_cast<__half*>(record + kScale)[i] = to_f16(memory.row[i].s * Real(unit));
    reinterpret_cast<__half*>(record + kZero)[i] = to_f16(memory.row[i].z);
  }
  if (i < Is::columns) reinterpret_cast<__half*>(record + kColumn)[i] = to_f16(memory.column[i]);
}

}  // namespace kvarn::cuda
