// SPDX-License-Identifier: Apache-2.0
// Codes out of their fragment order (specification section 4), as floats.
#pragma once

#include <cstdint>

#include "format/fragment.hpp"

namespace kvarn::cuda {

// One plane's fields of 4 rows x 4 columns: rows 16 row_group + 4 quad .., one a word; columns 4 column_group .., one a
// byte, in the order of word_byte.
template <format::Plane P>
__device__ uint4 fields(const uint8_t* plane, int row_group, int quad, int column_group) {
  static_assert(format::kLineBytes == 64 && format::kLineRows == 16 && format::kWordColumns == 4);
  const int step = column_group / P.column_fields;
  const int line = row_group / P.row_fields * P.steps + step;
  const int place = format::halves_exchanged(step) ? quad ^ 2 : quad;
  const uint4 w = *reinterpret_cast<const uint4*>(plane + format::kLineBytes * line + 16 * place);
  const int bit = P.width * (column_group % P.column_fields * P.row_fields + row_group % P.row_fields);
  constexpr uint32_t mask = 0x01010101u * ((1u << P.width) - 1);
  return {w.x >> bit & mask, w.y >> bit & mask, w.z >> bit & mask, w.w >> bit & mask};
}

// The codes of the same 4 x 4 places.
template <format::Planes M>
__device__ uint4 codes(const uint8_t* matrix, int row_group, int quad, int column_group) {
  uint4 c = fields<M.plane[0]>(matrix, row_group, quad, column_group);
  if constexpr (M.count == 2) {
    constexpr int shift = M.plane[1].shift;
    const uint4 high = fields<M.plane[1]>(matrix + M.plane[0].bytes(), row_group, quad, column_group);
    c = {c.x | high.x << shift, c.y | high.y << shift, c.z | high.z << shift, c.w | high.w << shift};
  }
  return c;
}

// The code of column `column` (0 .. 3) of a word. 2^23 + code is a byte put into place; the rest is exact.
__device__ inline float code_at(uint32_t word, int column) {
  const uint32_t selector = 0x7650u | static_cast<uint32_t>(format::word_byte(column));
  return __fadd_rn(__uint_as_float(__byte_perm(word, 0x4b000000u, selector)), -8388608.0f);
}

// (code * s + z) * t, rounded as the specification writes it: the product of an 8-bit code and an 11-bit scale is exact
// in float, so the fused operation rounds where code * s + z does.
__device__ inline float dequantize(float code, float s, float z, float t) {
  return __fmul_rn(__fmaf_rn(code, s, z), t);
}

}  // namespace kvarn::cuda
