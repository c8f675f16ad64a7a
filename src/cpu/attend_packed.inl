// SPDX-License-Identifier: Apache-2.0
// attend: scores = K q and outputs = V^T p on the codes, folded scales, a running softmax per column.
//
// Per packed tile of 128 x 128 and KV head: the codes are read once for 4 columns, and per column 2 * 2 * 16,384 byte
// products are 1,024 VNNI instructions, which bound it: one a cycle on Zen 4. docs/kernels-cpu.md has the account.
namespace kvarn::KVARN_CPU {

KVARN_INLINE void widen(const uint8_t* record, int64_t offset, int length, float* out) {
  for (int i = 0; i < length; i += 16) store(out + i, load_f16(section(record, offset) + i));
}

static void attend_packed(const kvarn_layout& layout, const uint8_t* record, const uint8_t* next,
                          const Columns& columns, float cap, Scratch& scratch) {
  const int tokens = layout.page_tokens, head_dim = layout.head_dim;
  const Product scores_of = make_product(record + layout.k_codes, tokens, head_dim, layout.k_bits, columns.count,
                                         scratch.k_codes, next + layout.k_codes);
  const Product parts_of = make_product(record + layout.v_codes, head_dim, tokens, layout.v_bits, columns.count,
                                        scratch.v_codes, next + layout.v_codes);
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
