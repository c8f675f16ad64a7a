// SPDX-License-Identifier: Apache-2.0
// Fragment order: where a code lies inside a code matrix (specification section 4, docs/fragment-order.md).
// K is a [G tokens][D channels] matrix, V a [D channels][G tokens] one: rows stay, columns are summed over.
#pragma once

#include <cstdint>

namespace kvarn::format {

inline constexpr int kLineBytes = 64;
inline constexpr int kLineRows = 16;    // words of a line
inline constexpr int kWordColumns = 4;  // bytes of a word

// One plane of `width` bits of an R x C matrix.
struct Plane {
  int width;       // bits per field: 8, 4, 2 or 1
  int shift;       // the plane holds bits shift .. shift+width-1 of a code
  int row_fields;  // fields of a byte that run along rows
  int column_fields;
  int steps;   // lines per row block = C / (4 column_fields)
  int blocks;  // row blocks = R / (16 row_fields)

  constexpr int64_t bytes() const { return int64_t{kLineBytes} * steps * blocks; }
};

constexpr Plane make_plane(int rows, int columns, int width, int shift) {
  const int fields = 8 / width;
  int row_fields = 1;
  while (row_fields < fields && (rows / kLineRows) % (2 * row_fields) == 0) row_fields *= 2;
  const int column_fields = fields / row_fields;
  return {width,
          shift,
          row_fields,
          column_fields,
          columns / (kWordColumns * column_fields),
          rows / (kLineRows * row_fields)};
}

// The planes of `bits`-bit codes, low bits first: 3 = 2 + 1.
struct Planes {
  int count;
  Plane plane[2];
};

constexpr Planes make_planes(int rows, int columns, int bits) {
  if (bits == 3) return {2, {make_plane(rows, columns, 2, 0), make_plane(rows, columns, 1, 2)}};
  return {1, {make_plane(rows, columns, bits, 0), {}}};
}

// Lines whose step is 2 or 3 mod 4 hold their 32-byte halves exchanged: a warp that reads 8 rows of 4 adjacent steps
// then touches every shared-memory bank once.
constexpr bool halves_exchanged(int step) { return (step & 2) != 0; }

// Which byte of its word a column takes: columns 0 1 2 3 lie as 0 2 1 3, so that a GPU's pairs of 16-bit values, bytes
// 0 and 2 or 1 and 3, are adjacent columns.
constexpr int word_byte(int column) { return 2 * (column % 2) + column / 2 % 2; }

struct CodePlace {
  int64_t byte;  // inside the plane
  int bit;
};

constexpr CodePlace code_place(const Plane& p, int row, int column) {
  const int block = row / (kLineRows * p.row_fields), field_r = row / kLineRows % p.row_fields, slot = row % kLineRows;
  const int step = column / (kWordColumns * p.column_fields), field_c = column / kWordColumns % p.column_fields;
  const int place = slot ^ (halves_exchanged(step) ? 8 : 0);
  const int64_t line = int64_t{block} * p.steps + step;
  return {kLineBytes * line + kWordColumns * place + word_byte(column), p.width * (field_c * p.row_fields + field_r)};
}

static_assert(make_plane(128, 128, 4, 0).row_fields == 2 && make_plane(80, 128, 2, 0).column_fields == 4);
static_assert(make_plane(128, 128, 4, 0).bytes() == 8192 && make_plane(96, 64, 1, 2).bytes() == 768);

}  // namespace kvarn::format
