// SPDX-License-Identifier: Apache-2.0
// The integer product of a packed tile's codes with the limbs of a warp's columns; exact.
//
// An operand's element is two bytes, its limbs. One quad has the high limb of column i in column 2 i of an MMA and the
// low one in 2 i + 1. Two quads have an MMA for each limb, with column i of quad j in its column 2 i + j: codes are
// unpacked once for both.
//
// A word of codes is 4 columns of one row; the fields of a byte are further rows: field f is multiplied together with
// the fields below it and the difference of two sums takes them out (docs/fragment-order.md).
#pragma once

#include <utility>

#include "cuda/machine.cuh"
#include "cuda/shape.hpp"

namespace kvarn::cuda {

// A code matrix of R rows (tokens of K, channels of V) and C columns that are summed over.
template <class S, bool kKeys>
struct Matrix {
  static constexpr int rows = kKeys ? S::page_tokens : S::head_dim, columns = kKeys ? S::head_dim : S::page_tokens;
  static constexpr format::Planes planes = kKeys ? S::k_planes : S::v_planes;
  static constexpr format::Plane plane = planes.plane[0];
  static constexpr int fields = plane.row_fields;  // row tiles (of 16) of a block
  static constexpr int blocks = rows / (16 * fields);
  static constexpr int lines = columns / 16;  // words of a lane along the columns
  static constexpr bool two_planes = planes.count == 2;
  // A product of field f is this many bits too large; a second plane is combined after shifting them out.
  static constexpr int excess(int field) { return two_planes ? 0 : plane.width * field; }
};

// The words of rows 16 T' + 2 g and + 1 (T' the block's first row tile and those of its fields), columns 16 line + 4 i.
template <int kBlock, int kLine>
__device__ inline uint2 load_words(const format::Plane& plane, const uint8_t* codes, int lane) {
  const int g = lane >> 2, i = lane & 3, fc = plane.column_fields;
  const int step = fc == 1 ? 4 * kLine + i : fc == 2 ? 2 * kLine + (i >> 1) : kLine;
  const int exchanged = fc == 1 ? i & 2 : fc == 2 ? 2 * (kLine & 1) : kLine & 2;
  uint2 words = load_as<uint2>(codes + 64 * (kBlock * plane.steps + step) + 8 * (g ^ (2 * exchanged)));
  if (fc > 1) {
    const int shift = (fc == 2 ? i & 1 : i) * plane.width * plane.row_fields;
    words.x >>= shift;
    words.y >>= shift;
  }
  return words;
}

// Field f and those below it, at its own place; the only or the topmost field of a byte needs no mask.
__device__ inline uint32_t nested(const format::Plane& plane, uint32_t word, int field) {
  const int bits = (field + 1) * plane.width;
  return bits == 8 ? word : word & ((1u << bits) - 1) * 0x01010101u;
}
// Field f alone, at its place: no shift, which would cost as much as the mask.
__device__ inline uint32_t single(const format::Plane& plane, uint32_t word, int field) {
  return word & (((1u << plane.width) - 1) << (field * plane.width)) * 0x01010101u;
}

// 256 * high limb + low limb of row h and quad j, of what the MMAs of a row tile gave.
template <int kQuads>
__device__ inline int limbs(const int (&c)[kQuads][4], int j, int h) {
  return kQuads == 1 ? 256 * c[0][2 * h] + c[0][2 * h + 1] : 256 * c[0][2 * h + j] + c[kQuads - 1][2 * h + j];
}

// sums[j][field][h]: row 16 (block * fields + field) + 2 g + h times column i of quad j. The operand of one quad, or
// the high and the low limbs of two.
template <class S, bool kKeys, int kBlock, int kQuads>
__device__ inline void product(const uint8_t* codes, const uint32_t (&operand)[kQuads][Matrix<S, kKeys>::lines],
                               int lane, int (&sums)[kQuads][Matrix<S, kKeys>::fields][2]) {
  using M = Matrix<S, kKeys>;
  constexpr format::Plane plane = M::plane, upper = M::planes.plane[1];
  int c[M::fields][kQuads][4] = {}, u[M::two_planes ? M::fields : 1][kQuads][4] = {};
  const auto step = [&]<int kLine>() {
    const uint2 w = load_words<kBlock, kLine>(plane, codes, lane),
                v = load_words<kBlock, kLine + 1>(plane, codes, lane);
#pragma unroll
    for (int f = 0; f < M::fields; ++f)
#pragma unroll
      for (int j = 0; j < kQuads; ++j)
        mma_bytes<kKeys>(c[f][j], nested(plane, w.x, f), nested(plane, w.y, f), nested(plane, v.x, f),
                         nested(plane, v.y, f), operand[j][kLine], operand[j][kLine + 1]);
    if constexpr (M::two_planes) {
      constexpr int kUpper = kBlock * M::fields / upper.row_fields, kField = kBlock * M::fields % upper.row_fields;
      const uint8_t* more = codes + plane.bytes();
      const uint2 x = load_words<kUpper, kLine>(upper, more, lane),
                  y = load_words<kUpper, kLine + 1>(upper, more, lane);
#pragma unroll
      for (int f = 0; f < M::fields; ++f)
#pragma unroll
        for (int j = 0; j < kQuads; ++j)
          mma_bytes<kKeys>(u[f][j], single(upper, x.x, kField + f), single(upper, x.y, kField + f),
                           single(upper, y.x, kField + f), single(upper, y.y, kField + f), operand[j][kLine],
                           operand[j][kLine + 1]);
    }
  };
  [&]<int... kSteps>(std::integer_sequence<int, kSteps...>) {
    (step.template operator()<2 * kSteps>(), ...);
  }(std::make_integer_sequence<int, M::lines / 2>{});

#pragma unroll
  for (int j = 0; j < kQuads; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int below = 0;
#pragma unroll
      for (int f = 0; f < M::fields; ++f) {
        const int with_below = limbs(c[f], j, h);
        sums[j][f][h] = with_below - below;
        below = with_below;
        if constexpr (M::two_planes) {
          constexpr int kField = kBlock * M::fields % upper.row_fields;
          // The upper product is as many bits too large as its field lies high, and counts 2^width: one shift, exact.
          const int by = plane.width - (kField + f) * upper.width, more = limbs(u[f], j, h);
          sums[j][f][h] = (sums[j][f][h] >> (plane.width * f)) + (by >= 0 ? more << by : more >> -by);
        }
      }
    }
}

template <class S, bool kKeys, class Body>
__device__ inline void for_blocks(Body body) {
  [&]<int... kBlocks>(std::integer_sequence<int, kBlocks...>) {
    (body.template operator()<kBlocks>(), ...);
  }(std::make_integer_sequence<int, Matrix<S, kKeys>::blocks>{});
}

}  // namespace kvarn::cuda
