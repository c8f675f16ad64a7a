// SPDX-License-Identifier: Apache-2.0
// attend: scores = K q and outputs = V^T p on the codes, in integers.
//
// The other operand is folded with the scales (r = q s_k, or p s_v), rounded to 15 bits relative to its largest element and
// cut into two signed bytes, r = unit (128 high + low). 4 codes x 4 bytes are one lane of a dot instruction and all sums are
// exact in int32 (255 * 16,256 * 256 columns < 2^31), so every target computes the same integers. Per packed tile of
// 128 x 128 and KV head: 16,384 codes unpacked twice, and per column 2 * 2 * 16,384 byte products = 1,024 VNNI instructions.
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
    store_lanes_i8(out.high + i, high);
    store_lanes_i8(out.low + i, sub(fixed, shift_left(high, 7)));
  }
}

// The product of code matrix and operands: out[column][row] = unit * (codes . operand), exact up to the one rounding at the
// end. Meanwhile the matrix of the next record comes in, a line (8-bit codes: two) every step: asked for all at once, it
// would wait for the miss buffers.
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
    for (int c = 0; c < kCount; ++c)
      KVARN_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const F sum = to_float(add(shift_left(high[b * kCount + c], 7), low[b * kCount + c]));
        store(out + c * rows + 16 * b, sum * set(operands[c].unit));
      }
  }
};

struct Product {
  const uint8_t* codes;  // a plane in fragment order, or what unpack made of the planes
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
    for (; block + kRowBlocks <= rows / 16; block += kRowBlocks) run_bytes<kCount, kWide, kRowBlocks>(block, operands, out);
    for (; block < rows / 16; ++block) run_bytes<kCount, kWide, 1>(block, operands, out);
  }

  // Straight from one plane whose fields are all rows: the fields of a line are taken kBlocks at a time.
  template <int kCount, int kWidth>
  void run_plane(const Operand* operands, float* out) const {
    constexpr int kRowFields = 8 / kWidth, kBlocks = kRowBlocks < kRowFields ? kRowBlocks : kRowFields;
    constexpr bool kWide = kWidth == 8;
    const I mask = set(static_cast<int32_t>(0x01010101u * ((1u << kWidth) - 1)));
    const int steps = columns / 4;
    int64_t done = 0;
    for (int block = 0; block < rows / (16 * kRowFields); ++block) {
      const uint8_t* in = codes + 64 * block * steps;
      KVARN_UNROLL
      for (int field = 0; field < kRowFields; field += kBlocks, done += steps) {
        Accumulators<kCount, kWide, kBlocks> sums;
        for (int s = 0; s < steps; s += 4) {
          KVARN_UNROLL
          for (int i = 0; i < 4; ++i) {
            prefetch<kWide>(done + s + i);
            I line = load_bytes(in + 64 * (s + i)), lines[kBlocks];
            if (format::halves_exchanged(i)) line = exchange_halves(line);
            KVARN_UNROLL
            for (int b = 0; b < kBlocks; ++b) lines[b] = bit_and(shift_right(line, kWidth * (field + b)), mask);
            sums.add_step(lines, operands, s + i);
          }
        }
        sums.finish(operands, out + 16 * (block * kRowFields + field), rows);
      }
    }
  }

  template <int kCount>
  void run(const Operand* operands, float* out) const {
    if (unpacked) return bits == 8 ? run_bytes<kCount, true>(operands, out) : run_bytes<kCount, false>(operands, out);
    if (bits == 8) return run_plane<kCount, 8>(operands, out);
    if (bits == 4) return run_plane<kCount, 4>(operands, out);
    return run_plane<kCount, 2>(operands, out);
  }
  void operator()(const Operand* operands, int count, float* out) const {
    for (; count >= kColumnBlock; count -= kColumnBlock, operands += kColumnBlock, out += kColumnBlock * rows)
      run<kColumnBlock>(operands, out);
    if (count == 3) run<3>(operands, out);
    if (count == 2) run<2>(operands, out);
    if (count == 1) run<1>(operands, out);
  }
};

// Up to kFoldColumns columns read the codes once, so they take them from the plane; more columns share an unpacked copy.
static Product make_product(const uint8_t* codes, int rows, int columns, int bits, bool few, uint8_t* bytes, const uint8_t* fetch) {
  const format::Planes planes = format::make_planes(rows, columns, bits);
  const bool direct = few && planes.count == 1 && planes.plane[0].column_fields == 1;
  if (!direct) unpack(codes, rows, columns, bits, bytes);
  return {direct ? codes : bytes, !direct, rows, columns, bits, fetch};
}

// cap * tanh(y / cap) in log2 units; tanh(x) = 1 - 2 / (e^2x + 1), through e^-2|x| so that nothing overflows.
KVARN_INLINE F soft_cap(F y, float cap) {
  const F x = y / set(cap), e = exp2_negative(abs(x) * set(-2.88539008f));
  const F magnitude = set(cap) * (set(1.0f) - e) / (set(1.0f) + e);
  return select(less(y, set(0.0f)), set(0.0f) - magnitude, magnitude);
}

// Scores of one column -> weights p = 2^(y - max) in place; the running maximum and sum move on. Returns the factor by which
// what the column has summed so far shrinks. n is a multiple of 16; scores beyond the last token are Columns::kLowest * 1.1.
KVARN_INLINE float softmax_step(float* scores, int n, float& running_max, float& running_sum) {
  F top = set(running_max);
  for (int t = 0; t < n; t += 16) top = max(load(scores + t), top);
  const float now = max_lanes(top), decay = exp2_negative(running_max - now);
  F total = set(0.0f);
  for (int t = 0; t < n; t += 16) {
    const F p = exp2_negative(load(scores + t) - set(now));
    store(scores + t, p);
    total = total + p;
  }
  running_sum = running_sum * decay + sum_lanes(total);
  running_max = now;
  return decay;
}

KVARN_INLINE void widen(const uint8_t* record, int64_t offset, int length, float* out) {
  for (int i = 0; i < length; i += 16) store(out + i, load_f16(section(record, offset) + i));
}

static void attend_packed(const kvarn_layout& layout, const uint8_t* record, const uint8_t* next, const Columns& columns, float cap,
                          Scratch& scratch) {
  const int tokens = layout.page_tokens, head_dim = layout.head_dim;
  const bool few = columns.count <= kFoldColumns;
  const Product scores_of = make_product(record + layout.k_codes, tokens, head_dim, layout.k_bits, few, scratch.k_codes, next + layout.k_codes);
  const Product parts_of = make_product(record + layout.v_codes, head_dim, tokens, layout.v_bits, few, scratch.v_codes, next + layout.v_codes);
  for (int64_t i = layout.k_scale; i < layout.v_codes; i += 64) __builtin_prefetch(next + i);
  for (int64_t i = layout.v_channel; i < layout.record_bytes; i += 64) __builtin_prefetch(next + i);

  alignas(64) float s_k[format::kMaxHeadDim], z_k[format::kMaxHeadDim], c_v[format::kMaxHeadDim];
  alignas(64) float t_k[format::kMaxPageTokens], s_v[format::kMaxPageTokens], z_v[format::kMaxPageTokens];
  widen(record, layout.k_scale, head_dim, s_k);
  widen(record, layout.k_zero, head_dim, z_k);
  widen(record, layout.k_token, tokens, t_k);
  widen(record, layout.v_channel, head_dim, c_v);
  widen(record, layout.v_scale, tokens, s_v);
  widen(record, layout.v_zero, tokens, z_v);
  alignas(64) Operand operands[kFoldColumns];
  alignas(64) float scores[kFoldColumns * format::kMaxPageTokens], parts[kFoldColumns * format::kMaxHeadDim];
  alignas(64) float folded[format::kMaxHeadDim];
  for (int first_column = 0; first_column < columns.count; first_column += kFoldColumns) {
    const int block = columns.count - first_column < kFoldColumns ? columns.count - first_column : kFoldColumns;
    float zero_terms[kFoldColumns], decays[kFoldColumns];

    for (int c = 0; c < block; ++c) {  // q s_k, and q . z_k
      const float* q = columns.q + (first_column + c) * head_dim;
      F zeros = set(0.0f);
      for (int d = 0; d < head_dim; d += 16) {
        const F value = load(q + d);
        store(folded + d, value * load(s_k + d));
        zeros = zeros + value * load(z_k + d);
      }
      zero_terms[c] = sum_lanes(zeros);
      make_operand(folded, head_dim, operands[c]);
    }
    scores_of(operands, block, scores);

    for (int c = 0; c < block; ++c) {  // softmax, then p s_v and p . z_v
      float* score = scores + c * tokens;
      for (int t = 0; t < tokens; t += 16) {
        F y = (load(score + t) + set(zero_terms[c])) * load(t_k + t);
        if (cap > 0) y = soft_cap(y, cap);
        store(score + t, max(y, set(Columns::kLowest)));
      }
      decays[c] = softmax_step(score, tokens, columns.max[first_column + c], columns.sum[first_column + c]);
      F zeros = set(0.0f);
      for (int t = 0; t < tokens; t += 16) {
        const F p = load(score + t);
        store(folded + t, p * load(s_v + t));
        zeros = zeros + p * load(z_v + t);
      }
      zero_terms[c] = sum_lanes(zeros);
      make_operand(folded, tokens, operands[c]);
    }
    parts_of(operands, block, parts);

    for (int c = 0; c < block; ++c) {
      float* out = columns.out + (first_column + c) * head_dim;
      for (int d = 0; d < head_dim; d += 16) {
        const F part = (load(parts + c * head_dim + d) + set(zero_terms[c])) * load(c_v + d);
        store(out + d, load(out + d) * set(decays[c]) + part);
      }
    }
  }
}

// scores[c][t] = q[c] . k[t] of kCount columns, 16 tokens at a time; beyond a column's visible tokens below everything.
template <int kCount>
static void raw_scores(const float* k, const float* q, const int32_t* visible, int tokens, int head_dim, float cap, float* scores) {
  F products[kCount][16];
  for (int first_token = 0; first_token < tokens; first_token += 16) {
    for (int t = 0; t < 16; ++t) {
      const float* row = k + (first_token + t < tokens ? first_token + t : tokens - 1) * head_dim;
      F sums[kCount];
      KVARN_UNROLL
      for (int c = 0; c < kCount; ++c) sums[c] = load(q + c * head_dim) * load(row);
      for (int d = 16; d < head_dim; d += 16) {
        const F key = load(row + d);
        KVARN_UNROLL
        for (int c = 0; c < kCount; ++c) sums[c] = sums[c] + load(q + c * head_dim + d) * key;
      }
      KVARN_UNROLL
      for (int c = 0; c < kCount; ++c) products[c][t] = sums[c];
    }
    for (int c = 0; c < kCount; ++c) {
      float* out = scores + c * format::kMaxPageTokens + first_token;
      F y = sum_each(products[c]);
      if (cap > 0) y = soft_cap(y, cap);
      store(out, max(y, set(Columns::kLowest)));
      for (int t = visible[c] > first_token ? visible[c] - first_token : 0; t < 16; ++t) out[t] = 1.1f * Columns::kLowest;
    }
  }
}

// out[c] = out[c] * decay[c] + sum of p[c][t] v[t] over 16 kVectors channels, tokens in order; p is 0 where not visible.
template <int kCount, int kVectors>
KVARN_INLINE void raw_values(const float* v, const float* p, int tokens, int head_dim, const float* decays, float* out) {
  F parts[kCount * kVectors];
  KVARN_UNROLL
  for (int i = 0; i < kCount * kVectors; ++i) parts[i] = set(0.0f);
  for (int t = 0; t < tokens; ++t) {
    F values[kVectors];
    KVARN_UNROLL
    for (int i = 0; i < kVectors; ++i) values[i] = load(v + t * head_dim + 16 * i);
    KVARN_UNROLL
    for (int c = 0; c < kCount; ++c)
      KVARN_UNROLL
      for (int i = 0; i < kVectors; ++i)
        parts[c * kVectors + i] = parts[c * kVectors + i] + set(p[c * format::kMaxPageTokens + t]) * values[i];
  }
  KVARN_UNROLL
  for (int c = 0; c < kCount; ++c)
    KVARN_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      float* to = out + c * head_dim + 16 * i;
      store(to, load(to) * set(decays[c]) + parts[c * kVectors + i]);
    }
}

// kCount columns from `first_column` on over a raw tile in scratch.k and scratch.v.
template <int kCount>
static void attend_raw_columns(const Columns& columns, int first_column, const int32_t* visible, int head_dim, float cap,
                               const Scratch& scratch) {
  alignas(64) float scores[kCount * format::kMaxPageTokens];
  float decays[kCount];
  int tokens = 0;
  for (int c = 0; c < kCount; ++c) tokens = visible[first_column + c] > tokens ? visible[first_column + c] : tokens;
  raw_scores<kCount>(scratch.k, columns.q + first_column * head_dim, visible + first_column, tokens, head_dim, cap, scores);
  for (int c = 0; c < kCount; ++c)
    decays[c] = softmax_step(scores + c * format::kMaxPageTokens, (tokens + 15) / 16 * 16, columns.max[first_column + c],
                             columns.sum[first_column + c]);
  float* out = columns.out + first_column * head_dim;
  int d = 0;
  for (; d + 16 * kRawVectors <= head_dim; d += 16 * kRawVectors)
    raw_values<kCount, kRawVectors>(scratch.v + d, scores, tokens, head_dim, decays, out + d);
  for (; d < head_dim; d += 16) raw_values<kCount, 1>(scratch.v + d, scores, tokens, head_dim, decays, out + d);
}

static void attend_raw(const kvarn_layout& layout, const RawTile& raw, const int32_t* visible, const Columns& columns, float cap,
                       Scratch& scratch) {
  const int head_dim = layout.head_dim;
  int tokens = 0;
  for (int c = 0; c < columns.count; ++c) tokens = visible[c] > tokens ? visible[c] : tokens;
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < head_dim; d += 16) {
      store(scratch.k + t * head_dim + d, load_f16(raw.k[t] + d));
      store(scratch.v + t * head_dim + d, load_f16(raw.v[t] + d));
    }
  int c = 0;
  for (; c + kColumnBlock <= columns.count; c += kColumnBlock)
    attend_raw_columns<kColumnBlock>(columns, c, visible, head_dim, cap, scratch);
  for (; c < columns.count; ++c) attend_raw_columns<1>(columns, c, visible, head_dim, cap, scratch);
}

static void fold(int head_dim, const Columns& total, const Columns& part) {
  for (int c = 0; c < total.count; ++c) {
    const float top = total.max[c] > part.max[c] ? total.max[c] : part.max[c];
    const float a = exp2_negative(total.max[c] - top), b = exp2_negative(part.max[c] - top);
    for (int d = c * head_dim; d < (c + 1) * head_dim; d += 16)
      store(total.out + d, load(total.out + d) * set(a) + load(part.out + d) * set(b));
    total.sum[c] = total.sum[c] * a + part.sum[c] * b;
    total.max[c] = top;
  }
}

static void finish(const Columns& columns, int column, int head_dim, void* out, kvarn_dtype dtype) {
  F x[16];
  const F inverse = set(1.0f / columns.sum[column]);
  for (int i = 0; i < head_dim / 16; ++i) x[i] = load(columns.out + column * head_dim + 16 * i) * inverse;
  rotate_vectors(x, head_dim);
  for (int i = 0; i < head_dim / 16; ++i) store_any(x[i], out, dtype, 16 * i);
}

}  // namespace kvarn::KVARN_CPU
