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

// out[column][row] = unit * (codes . operand), exact up to the one rounding of the product.
// codes [rows / 16][columns / 4][16][4]; kBlocks row blocks and kCount columns at a time.
template <int kCount, bool kWide, int kBlocks>
KVARN_INLINE void multiply_rows(const uint8_t* codes, int block, int quads, const Operand* operands, float* out, int rows) {
  I high[kBlocks * kCount], low[kBlocks * kCount];
  KVARN_UNROLL
  for (int i = 0; i < kBlocks * kCount; ++i) high[i] = low[i] = zero();
  const uint8_t* base = codes + 64 * block * quads;
  for (int s = 0; s < quads; ++s) {
    I line[kBlocks];
    KVARN_UNROLL
    for (int b = 0; b < kBlocks; ++b) line[b] = load_bytes(base + 64 * (b * quads + s));
    KVARN_UNROLL
    for (int c = 0; c < kCount; ++c) {
      int32_t quad_high, quad_low;
      __builtin_memcpy(&quad_high, operands[c].high + 4 * s, 4);
      __builtin_memcpy(&quad_low, operands[c].low + 4 * s, 4);
      KVARN_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        high[b * kCount + c] = dot<kWide>(high[b * kCount + c], line[b], quad_high);
        low[b * kCount + c] = dot<kWide>(low[b * kCount + c], line[b], quad_low);
      }
    }
  }
  KVARN_UNROLL
  for (int c = 0; c < kCount; ++c)
    KVARN_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      const F sum = to_float(add(shift_left(high[b * kCount + c], 7), low[b * kCount + c]));
      store(out + c * rows + 16 * (block + b), sum * set(operands[c].unit));
    }
}

template <int kCount, bool kWide>
static void multiply(const uint8_t* codes, int rows, int columns, const Operand* operands, float* out) {
  const int blocks = rows / 16, quads = columns / 4;
  int block = 0;
  for (; block + kRowBlocks <= blocks; block += kRowBlocks)
    multiply_rows<kCount, kWide, kRowBlocks>(codes, block, quads, operands, out, rows);
  for (; block < blocks; ++block) multiply_rows<kCount, kWide, 1>(codes, block, quads, operands, out, rows);
}

template <bool kWide>
static void multiply_columns(const uint8_t* codes, int rows, int columns, const Operand* operands, int count, float* out) {
  for (; count >= kColumnBlock; count -= kColumnBlock, operands += kColumnBlock, out += kColumnBlock * rows)
    multiply<kColumnBlock, kWide>(codes, rows, columns, operands, out);
  if (count == 3) multiply<3, kWide>(codes, rows, columns, operands, out);
  if (count == 2) multiply<2, kWide>(codes, rows, columns, operands, out);
  if (count == 1) multiply<1, kWide>(codes, rows, columns, operands, out);
}

KVARN_INLINE void multiply(const uint8_t* codes, int rows, int columns, int bits, const Operand* operands, int count, float* out) {
  (bits == 8 ? multiply_columns<true> : multiply_columns<false>)(codes, rows, columns, operands, count, out);
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

static void attend_packed(const kvarn_layout& layout, const uint8_t* record, const uint8_t* next, const Columns& columns, float cap,
                          Scratch& scratch) {
  const int tokens = layout.page_tokens, head_dim = layout.head_dim;
  const int64_t ahead = next - record;
  unpack(record + layout.k_codes, tokens, head_dim, layout.k_bits, scratch.k_codes, ahead);
  unpack(record + layout.v_codes, head_dim, tokens, layout.v_bits, scratch.v_codes, ahead);
  for (int64_t i = layout.k_scale; i < layout.v_codes; i += 64) __builtin_prefetch(next + i);
  for (int64_t i = layout.v_channel; i < layout.record_bytes; i += 64) __builtin_prefetch(next + i);

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
        store(folded + d, value * load_f16(section(record, layout.k_scale) + d));
        zeros = zeros + value * load_f16(section(record, layout.k_zero) + d);
      }
      zero_terms[c] = sum_lanes(zeros);
      make_operand(folded, head_dim, operands[c]);
    }
    multiply(scratch.k_codes, tokens, head_dim, layout.k_bits, operands, block, scores);

    for (int c = 0; c < block; ++c) {  // softmax, then p s_v and p . z_v
      float* score = scores + c * tokens;
      for (int t = 0; t < tokens; t += 16) {
        F y = (load(score + t) + set(zero_terms[c])) * load_f16(section(record, layout.k_token) + t);
        if (cap > 0) y = soft_cap(y, cap);
        store(score + t, max(y, set(Columns::kLowest)));
      }
      decays[c] = softmax_step(score, tokens, columns.max[first_column + c], columns.sum[first_column + c]);
      F zeros = set(0.0f);
      for (int t = 0; t < tokens; t += 16) {
        const F p = load(score + t);
        store(folded + t, p * load_f16(section(record, layout.v_scale) + t));
        zeros = zeros + p * load_f16(section(record, layout.v_zero) + t);
      }
      zero_terms[c] = sum_lanes(zeros);
      make_operand(folded, tokens, operands[c]);
    }
    multiply(scratch.v_codes, head_dim, tokens, layout.v_bits, operands, block, parts);

    for (int c = 0; c < block; ++c) {
      float* out = columns.out + (first_column + c) * head_dim;
      for (int d = 0; d < head_dim; d += 16) {
        const F part = (load(parts + c * head_dim + d) + set(zero_terms[c])) * load_f16(section(record, layout.v_channel) + d);
        store(out + d, load(out + d) * set(decays[c]) + part);
      }
    }
  }
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
  alignas(64) float scores[format::kMaxPageTokens];
  for (int c = 0; c < columns.count; ++c) {
    const float* q = columns.q + c * head_dim;
    const int padded = (visible[c] + 15) / 16 * 16;
    for (int t = 0; t < visible[c]; ++t) {
      const float* k = scratch.k + t * head_dim;
      F products = load(q) * load(k);
      for (int d = 16; d < head_dim; d += 16) products = products + load(q + d) * load(k + d);
      scores[t] = sum_lanes(products);
    }
    for (int t = visible[c]; t < padded; ++t) scores[t] = 1.1f * Columns::kLowest;
    for (int t = 0; t < visible[c]; t += 16) {
      F y = load(scores + t);
      const M token = less(set(Columns::kLowest), y);
      if (cap > 0) y = select(token, soft_cap(y, cap), y);
      store(scores + t, y);
    }
    const float decay = softmax_step(scores, padded, columns.max[c], columns.sum[c]);
    float* out = columns.out + c * head_dim;
    for (int d = 0; d < head_dim; d += 16) {
      F part = set(scores[0]) * load(scratch.v + d);
      for (int t = 1; t < visible[c]; ++t) part = part + set(scores[t]) * load(scratch.v + t * head_dim + d);
      store(out + d, load(out + d) * set(decay) + part);
    }
  }
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
