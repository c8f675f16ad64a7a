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
              four = (four & 0xff0000ffu) | ((four & 0xff00u) << 8) | ((four >> 8) & 0xff00u);  // as format::word_byte
              word |= ((four >> plane.shift) & mask) << (plane.width * (c * plane.row_fields + r));
            }
          __builtin_memcpy(out + 4 * (slot ^ exchange), &word, 4);
        }
        out += format::kLineBytes;
      }
  }
}

// Line `step` of the row block that begins at `in`, its halves in order.
KVARN_INLINE I line_at(const uint8_t* in, int step) {
  const I line = load_bytes(in + format::kLineBytes * step);
  return format::halves_exchanged(step) ? exchange_halves(line) : line;
}

// Fragment order -> bytes [rows / 16][columns / 4][16 rows][4 columns as word_byte]: 64 codes in one register, for dot.
template <int kWidth, int kRowFields, bool kFirst>
static void unpack_plane(const uint8_t* in, const format::Plane& plane, uint8_t* codes) {
  constexpr int kColumnFields = 8 / kWidth / kRowFields;
  const I mask = set(static_cast<int32_t>(0x01010101u * ((1u << kWidth) - 1)));
  const int quads = plane.steps * kColumnFields;
  for (int block = 0; block < plane.blocks; ++block, in += format::kLineBytes * plane.steps) {
    uint8_t* to = codes + 64 * block * kRowFields * quads;
    for (int step = 0; step < plane.steps; ++step, to += 64 * kColumnFields) {
      const I line = line_at(in, step);
      KVARN_UNROLL
      for (int field = 0; field < kColumnFields * kRowFields; ++field) {
        const I bits = bit_and(shift_right(line, kWidth * field), mask);
        uint8_t* at = to + 64 * (field % kRowFields * quads + field / kRowFields);
        store_bytes(at, kFirst ? bits : bit_or(load_bytes(at), shift_left(bits, plane.shift)));
      }
    }
  }
}

static void unpack(const uint8_t* in, int rows, int columns, int bits, uint8_t* codes) {
  using Function = void (*)(const uint8_t*, const format::Plane&, uint8_t*);
  // [log2 of width][log2 of row fields]; a second plane of 3-bit codes is 1 bit wide.
  static constexpr Function kFirst[4][4] = {
      {},
      {unpack_plane<2, 1, true>, unpack_plane<2, 2, true>, unpack_plane<2, 4, true>},
      {unpack_plane<4, 1, true>, unpack_plane<4, 2, true>},
      {unpack_plane<8, 1, true>}};
  static constexpr Function kSecond[4] = {unpack_plane<1, 1, false>, unpack_plane<1, 2, false>,
                                          unpack_plane<1, 4, false>, unpack_plane<1, 8, false>};
  const format::Planes planes = format::make_planes(rows, columns, bits);
  const auto log2 = [](int x) { return __builtin_ctz(static_cast<unsigned>(x)); };
  kFirst[log2(planes.plane[0].width)][log2(planes.plane[0].row_fields)](in, planes.plane[0], codes);
  if (planes.count == 2)
    kSecond[log2(planes.plane[1].row_fields)](in + planes.plane[0].bytes(), planes.plane[1], codes);
}

KVARN_INLINE const uint16_t* section(const uint8_t* record, int64_t offset) {
  return reinterpret_cast<const uint16_t*>(record + offset);
}

static void expand(const kvarn_layout& layout, const uint8_t* record, float* k, float* v, Scratch& scratch) {
  const int tokens = layout.page_tokens, head_dim = layout.head_dim;
  unpack(record + layout.k_codes, tokens, head_dim, layout.k_bits, scratch.k_codes);
  unpack(record + layout.v_codes, head_dim, tokens, layout.v_bits, scratch.v_codes);
  float token[format::kMaxPageTokens], scale[format::kMaxPageTokens], zero[format::kMaxPageTokens],
      codes[format::kMaxHeadDim];
  for (int t = 0; t < tokens; t += 16) {
    store(token + t, load_f16(section(record, layout.k_token) + t));
    store(scale + t, load_f16(section(record, layout.v_scale) + t));
    store(zero + t, load_f16(section(record, layout.v_zero) + t));
  }
  for (int t = 0; t < tokens; ++t) {
    const uint8_t* row = scratch.k_codes + 64 * (t / 16) * (head_dim / 4) + 4 * (t % 16);
    for (int d = 0; d < head_dim; ++d) codes[d] = row[64 * (d / 4) + format::word_byte(d)];
    for (int d = 0; d < head_dim; d += 16) {
      const F s = load_f16(section(record, layout.k_scale) + d), z = load_f16(section(record, layout.k_zero) + d);
      store(k + t * head_dim + d, (load(codes + d) * s + z) * set(token[t]));
    }
    const uint8_t* column = scratch.v_codes + 64 * (t / 4) + format::word_byte(t);
    for (int d = 0; d < head_dim; ++d) codes[d] = column[64 * (d / 16) * (tokens / 4) + 4 * (d % 16)];
    for (int d = 0; d < head_dim; d += 16) {
      const F c = load_f16(section(record, layout.v_channel) + d);
      store(v + t * head_dim + d, (load(codes + d) * set(scale[t]) + set(zero[t])) * c);
    }
  }
}

}  // namespace kvarn::KVARN_CPU
