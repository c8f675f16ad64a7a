// SPDX-License-Identifier: Apache-2.0
// Code matrices: bytes in and out of fragment order (specification section 4).
namespace kvarn::KVARN_CPU {

// codes [rows][columns] -> fragment order. Words of 4 codes are moved whole.
static void pack(const uint8_t* codes, int rows, int columns, int bits, uint8_t* out) {
  const format::Planes planes = format::make_planes(rows, columns, bits);
  for (int p = 0; p < planes.count; ++p) {
    const format::Plane plane = planes.plane[p];
    const uint32_t mask = 0x01010101u * ((1u << plane.width) - 1);
    for (int block = 0; block < plane.blocks; ++block)
      for (int step = 0; step < plane.steps; ++step) {
        const int exchange = format::halves_exchanged(step) ? 8 : 0;
        for (int slot = 0; slot < 16; ++slot) {
          uint32_t word = 0;
          for (int c = 0; c < plane.column_fields; ++c)
            for (int r = 0; r < plane.row_fields; ++r) {
              const int row = 16 * (block * plane.row_fields + r) + slot, column = 4 * (step * plane.column_fields + c);
              uint32_t four;
              __builtin_memcpy(&four, codes + row * columns + column, 4);
              word |= ((four >> plane.shift) & mask) << (plane.width * (c * plane.row_fields + r));
            }
          __builtin_memcpy(out + 4 * (slot ^ exchange), &word, 4);
        }
        out += format::kLineBytes;
      }
  }
}

// Fragment order -> bytes [rows / 16][columns / 4][16 rows][4 columns]: 64 codes in one register, ready for dot.
template <int kWidth>
KVARN_INLINE void unpack_plane(const uint8_t* in, const format::Plane plane, uint8_t* codes) {
  const I mask = set(static_cast<int32_t>(0x01010101u * ((1u << kWidth) - 1)));
  const int quads = plane.steps * plane.column_fields;
  for (int block = 0; block < plane.blocks; ++block)
    for (int step = 0; step < plane.steps; ++step, in += format::kLineBytes) {
      I line = load_bytes(in);
      if (format::halves_exchanged(step)) line = exchange_halves(line);
      uint8_t* to = codes + 64 * (block * plane.row_fields * quads + step * plane.column_fields);
      for (int c = 0; c < plane.column_fields; ++c)
        for (int r = 0; r < plane.row_fields; ++r) {
          const I field = bit_and(shift_right(line, kWidth * (c * plane.row_fields + r)), mask);
          uint8_t* at = to + 64 * (r * quads + c);
          store_bytes(at, plane.shift == 0 ? field : bit_or(load_bytes(at), shift_left(field, plane.shift)));
        }
    }
}

static void unpack(const uint8_t* in, int rows, int columns, int bits, uint8_t* codes) {
  const format::Planes planes = format::make_planes(rows, columns, bits);
  for (int p = 0; p < planes.count; ++p) {
    const format::Plane plane = planes.plane[p];
    switch (plane.width) {
      case 8: unpack_plane<8>(in, plane, codes); break;
      case 4: unpack_plane<4>(in, plane, codes); break;
      case 2: unpack_plane<2>(in, plane, codes); break;
      default: unpack_plane<1>(in, plane, codes);
    }
    in += plane.bytes();
  }
}

KVARN_INLINE const uint16_t* section(const uint8_t* record, int64_t offset) {
  return reinterpret_cast<const uint16_t*>(record + offset);
}

static void expand(const kvarn_layout& layout, const uint8_t* record, float* k, float* v, Scratch& scratch) {
  const int tokens = layout.page_tokens, head_dim = layout.head_dim;
  unpack(record + layout.k_codes, tokens, head_dim, layout.k_bits, scratch.k_codes);
  unpack(record + layout.v_codes, head_dim, tokens, layout.v_bits, scratch.v_codes);
  float token[format::kMaxPageTokens], scale[format::kMaxPageTokens], zero[format::kMaxPageTokens], codes[format::kMaxHeadDim];
  for (int t = 0; t < tokens; t += 16) {
    store(token + t, load_f16(section(record, layout.k_token) + t));
    store(scale + t, load_f16(section(record, layout.v_scale) + t));
    store(zero + t, load_f16(section(record, layout.v_zero) + t));
  }
  for (int t = 0; t < tokens; ++t) {
    const uint8_t* row = scratch.k_codes + 64 * (t / 16) * (head_dim / 4) + 4 * (t % 16);
    for (int d = 0; d < head_dim; ++d) codes[d] = row[64 * (d / 4) + d % 4];
    for (int d = 0; d < head_dim; d += 16) {
      const F s = load_f16(section(record, layout.k_scale) + d), z = load_f16(section(record, layout.k_zero) + d);
      store(k + t * head_dim + d, (load(codes + d) * s + z) * set(token[t]));
    }
    const uint8_t* column = scratch.v_codes + 64 * (t / 4) + t % 4;
    for (int d = 0; d < head_dim; ++d) codes[d] = column[64 * (d / 16) * (tokens / 4) + 4 * (d % 16)];
    for (int d = 0; d < head_dim; d += 16) {
      const F c = load_f16(section(record, layout.v_channel) + d);
      store(v + t * head_dim + d, (load(codes + d) * set(scale[t]) + set(zero[t])) * c);
    }
  }
}

}  // namespace kvarn::KVARN_CPU
