// SPDX-License-Identifier: Apache-2.0
// Codes times a folded operand, in integers.
//
// The operand (r = q s_k, or p s_v) is rounded to 15 bits relative to its largest element and cut into two signed
// bytes, r = unit (128 high + low). 4 codes x 4 bytes are one lane of a dot instruction, and all sums are exact in
// int32 (255 * 16,256 * 256 columns < 2^31), so every target computes the same integers.
namespace kvarn::KVARN_CPU {

inline constexpr int kFoldColumns = 4;          // columns between two passes over the codes
inline constexpr float kFixedPoint = 16256.0f;  // 127 * 128: both bytes stay within int8

struct Operand {
  alignas(64) int8_t high[format::kMaxHeadDim], low[format::kMaxHeadDim];
  float unit;
};

// values [n] -> fixed point. An all-zero (or vanishing) operand gets unit 0.
KVARN_INLINE void make_operand(const float* values, int n, Operand& out) {
  F top = set(0.0f);
  for (int i = 0; i < n; i += 16) top = max(abs(load(values + i)), top);
  const float largest = max_lanes(top);
  const bool usable = largest > 1e-30f;
  out.unit = usable ? largest / kFixedPoint : 0.0f;
  const F inverse = set(usable ? kFixedPoint / largest : 0.0f), limit = set(kFixedPoint);
  for (int i = 0; i < n; i += 16) {
    const I fixed = to_int(max(min(load(values + i) * inverse, limit), set(-kFixedPoint)));
    const I high = shift_right_signed(add(fixed, set(64)), 7);
    store_words_i8(out.high + i, high);
    store_words_i8(out.low + i, sub(fixed, shift_left(high, 7)));
  }
}

// The product of code matrix and operands: out[column][row] = unit * (codes . operand), exact up to the one rounding at
// the end. Meanwhile the matrix of the next record comes in, a line (8-bit codes: two) every step: asked for all at
// once, it would wait for the miss buffers.
template <int kCount, bool kWide, int kBlocks>
struct Accumulators {
  I high[kBlocks * kCount], low[kBlocks * kCount];

  KVARN_INLINE Accumulators() {
    KVARN_UNROLL
    for (int i = 0; i < kBlocks * kCount; ++i) high[i] = low[i] = zero();
  }
  // lines: 16 rows x 4 columns each, of kBlocks row blocks; step counts columns in fours.
  KVARN_INLINE void add_step(const I* lines, const Operand* operands, int step) {
    KVARN_UNROLL
    for (int c = 0; c < kCount; ++c) {
      int32_t quad_high, quad_low;
      __builtin_memcpy(&quad_high, operands[c].high + 4 * step, 4);
      __builtin_memcpy(&quad_low, operands[c].low + 4 * step, 4);
      KVARN_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        high[b * kCount + c] = dot<kWide>(high[b * kCount + c], lines[b], quad_high);
        low[b * kCount + c] = dot<kWide>(low[b * kCount + c], lines[b], quad_low);
      }
    }
  }
  // out: that of the first row of the first block
  KVARN_INLINE void finish(const Operand* operands, float* out, int rows) const {
    KVARN_UNROLL
    for (int c = 0; c < kCount; ++c) {
      KVARN_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const F sum = to_float(add(shift_left(high[b * kCount + c], 7), low[b * kCount + c]));
        store(out + c * rows + 16 * b, sum * set(operands[c].unit));
      }
    }
  }
};

struct Product {
  const uint8_t* codes;  // planes in fragment order, or what unpack made of them
  bool unpacked;
  int rows, columns, bits;
  const uint8_t* fetch;  // the next record's codes

  template <bool kWide>
  KVARN_INLINE void prefetch(int64_t step) const {
    for (int i = 0; i < (kWide ? 2 : 1); ++i) __builtin_prefetch(fetch + 64 * ((kWide ? 2 : 1) * step + i));
  }

  // From bytes [rows / 16][columns / 4][16][4].
  template <int kCount, bool kWide, int kBlocks>
  KVARN_INLINE void run_bytes(int block, const Operand* operands, float* out) const {
    const int steps = columns / 4;
    const uint8_t* in = codes + 64 * block * steps;
    Accumulators<kCount, kWide, kBlocks> sums;
    for (int s = 0; s < steps; ++s) {
      I lines[kBlocks];
      prefetch<kWide>(block / kBlocks * steps + s);
      KVARN_UNROLL
      for (int b = 0; b < kBlocks; ++b) lines[b] = load_bytes(in + 64 * (b * steps + s));
      sums.add_step(lines, operands, s);
    }
    sums.finish(operands, out + 16 * block, rows);
  }
  template <int kCount, bool kWide>
  void run_bytes(const Operand* operands, float* out) const {
    int block = 0;
    for (; block + kRowBlocks <= rows / 16; block += kRowBlocks)
      run_bytes<kCount, kWide, kRowBlocks>(block, operands, out);
    for (; block < rows / 16; ++block) run_bytes<kCount, kWide, 1>(block, operands, out);
  }

  // Fields field, field + 1, .. of the row blocks that share a line of the second plane, which is of one bit, the top
  // one.
  template <int kWidth, bool kTwoPlanes, int kBlocks>
  KVARN_INLINE static void fields_of(const uint8_t* in, const uint8_t* tops, int step, int field, I (&lines)[kBlocks]) {
    const I mask = set(static_cast<int32_t>(0x01010101u * ((1u << kWidth) - 1))), top_mask = set(0x01010101 << kWidth);
    const I line = line_at(in, step);
    KVARN_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      const int at = field + b;
      lines[b] = bit_and(shift_right(line, kWidth * at % 8), mask);
      if constexpr (kTwoPlanes) {
        const I top = line_at(tops, step);
        const I moved = at < kWidth ? shift_left(top, kWidth - at) : shift_right(top, at - kWidth);
        lines[b] = bit_or(lines[b], bit_and(moved, top_mask));
      }
    }
  }

  // Straight from planes whose fields are all rows: the fields of a line are taken kBlocks at a time.
  template <int kCount, int kWidth, bool kTwoPlanes = false>
  void run_planes(const Operand* operands, float* out) const {
    constexpr int kRowFields = 8 / kWidth, kFields = kTwoPlanes ? 8 : kRowFields;
    constexpr int kBlocks = kRowBlocks < kRowFields ? kRowBlocks : kRowFields;
    constexpr bool kWide = kWidth == 8;
    const int steps = columns / 4, block = format::kLineBytes * steps;  // bytes of a row block
    const uint8_t *in = codes, *tops = codes + rows * columns * kWidth / 8;
    int64_t done = 0;
    for (int row = 0; row < rows; row += 16 * kFields, in += kFields / kRowFields * block, tops += block) {
      KVARN_UNROLL
      for (int field = 0; field < kFields; field += kBlocks, done += steps) {
        const uint8_t* from = in + field / kRowFields * block;
        Accumulators<kCount, kWide, kBlocks> sums;
        for (int s = 0; s < steps; s += 4) {
          KVARN_UNROLL
          for (int i = 0; i < 4; ++i) {
            I lines[kBlocks];
            prefetch<kWide>(done + s + i);
            fields_of<kWidth, kTwoPlanes>(from + 64 * s, tops + 64 * s, i, field, lines);
            sums.add_step(lines, operands, s + i);
          }
        }
        sums.finish(operands, out + row + 16 * field, rows);
      }
    }
  }

  template <int kCount>
  void run(const Operand* operands, float* out) const {
    if (unpacked) return bits == 8 ? run_bytes<kCount, true>(operands, out) : run_bytes<kCount, false>(operands, out);
    if (bits == 8) return run_planes<kCount, 8>(operands, out);
    if (bits == 4) return run_planes<kCount, 4>(operands, out);
    if (bits == 3) return run_planes<kCount, 2, true>(operands, out);
    return run_planes<kCount, 2>(operands, out);
  }
  void operator()(const Operand* operands, int count, float* out) const {
    for (; count >= kColumnBlock; count -= kColumnBlock, operands += kColumnBlock, out += kColumnBlock * rows)
      run<kColumnBlock>(operands, out);
    if (count == 3) run<3>(operands, out);
    if (count == 2) run<2>(operands, out);
    if (count == 1) run<1>(operands, out);
  }
};

// For `count` operands. A few take the codes from their plane, or from two planes if one pass over them does; more of
// them share an unpacked copy.
static Product make_product(const uint8_t* codes, int rows, int columns, int bits, int count, uint8_t* bytes,
                            const uint8_t* fetch) {
  const format::Planes planes = format::make_planes(rows, columns, bits);
  const int few = planes.count == 1 ? kFoldColumns : kColumnBlock;
  const bool direct = count <= few && planes.plane[planes.count - 1].column_fields == 1;
  if (!direct) unpack(codes, rows, columns, bits, bytes);
  return {direct ? codes : bytes, !direct, rows, columns, bits, fetch};
}

}  // namespace kvarn::KVARN_CPU
