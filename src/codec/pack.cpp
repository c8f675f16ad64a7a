// SPDX-License-Identifier: Apache-2.0
// Fragment order, straight from format::code_place.
#include <cstring>

#include "codec/tile.hpp"
#include "format/fragment.hpp"

namespace kvarn::codec {

void pack(const uint8_t* codes, int rows, int columns, int bits, uint8_t* out) {
  const format::Planes planes = format::make_planes(rows, columns, bits);
  for (int p = 0; p < planes.count; ++p) {
    const format::Plane& plane = planes.plane[p];
    std::memset(out, 0, static_cast<size_t>(plane.bytes()));
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) {
        const format::CodePlace at = format::code_place(plane, r, c);
        const int field = (codes[r * columns + c] >> plane.shift) & ((1 << plane.width) - 1);
        out[at.byte] = static_cast<uint8_t>(out[at.byte] | field << at.bit);
      }
    out += plane.bytes();
  }
}

void unpack(const uint8_t* in, int rows, int columns, int bits, uint8_t* codes) {
  const format::Planes planes = format::make_planes(rows, columns, bits);
  std::memset(codes, 0, static_cast<size_t>(rows) * static_cast<size_t>(columns));
  for (int p = 0; p < planes.count; ++p) {
    const format::Plane& plane = planes.plane[p];
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) {
        const format::CodePlace at = format::code_place(plane, r, c);
        const int field = (in[at.byte] >> at.bit) & ((1 << plane.width) - 1);
        codes[r * columns + c] = static_cast<uint8_t>(codes[r * columns + c] | field << plane.shift);
      }
    in += plane.bytes();
  }
}

}  // namespace kvarn::codec
