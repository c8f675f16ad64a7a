// SPDX-License-Identifier: Apache-2.0
// attend over the raw tokens of a row's own tile, in binary32. A full raw tile costs a decode row of 4 heads what about
// three packed ones do (5.7 us on a Zen 4 core), although the 4 columns share every token that is loaded.
namespace kvarn::KVARN_CPU {

// scores[c][t] = q[c] . k[t] of kCount columns, 16 tokens at a time; beyond a column's visible tokens below everything.
template <int kCount>
static void raw_scores(const float* k, const float* q, const int32_t* visible, int tokens, int head_dim, float cap,
                       float* scores) {
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
      for (int t = visible[c] > first_token ? visible[c] - first_token : 0; t < 16; ++t)
        out[t] = 1.1f * Columns::kLowest;
    }
  }
}

// out[c] = out[c] * decay[c] + sum of p[c][t] v[t] over 16 kVectors channels, tokens in order; p is 0 where not
// visible.
template <int kCount, int kVectors>
KVARN_INLINE void raw_values(const float* v, const float* p, int tokens, int head_dim, const float* decays,
                             float* out) {
  F parts[kCount * kVectors];
  KVARN_UNROLL
  for (int i = 0; i < kCount * kVectors; ++i) parts[i] = set(0.0f);
  for (int t = 0; t < tokens; ++t) {
    F values[kVectors];
    KVARN_UNROLL
    for (int i = 0; i < kVectors; ++i) values[i] = load(v + t * head_dim + 16 * i);
    KVARN_UNROLL
    for (int c = 0; c < kCount; ++c) {
      KVARN_UNROLL
      for (int i = 0; i < kVectors; ++i)
        parts[c * kVectors + i] = parts[c * kVectors + i] + set(p[c * format::kMaxPageTokens + t]) * values[i];
    }
  }
  KVARN_UNROLL
  for (int c = 0; c < kCount; ++c) {
    KVARN_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      float* to = out + c * head_dim + 16 * i;
      store(to, load(to) * set(decays[c]) + parts[c * kVectors + i]);
    }
  }
}

// kCount columns from `first_column` on over a raw tile in scratch.k and scratch.v.
template <int kCount>
static void attend_raw_columns(const Columns& columns, int first_column, const int32_t* visible, int head_dim,
                               float cap, const Scratch& scratch) {
  alignas(64) float scores[kCount * format::kMaxPageTokens];
  float decays[kCount];
  int tokens = 0;
  for (int c = 0; c < kCount; ++c) tokens = visible[first_column + c] > tokens ? visible[first_column + c] : tokens;
  raw_scores<kCount>(scratch.k, columns.q + first_column * head_dim, visible + first_column, tokens, head_dim, cap,
                     scores);
  for (int c = 0; c < kCount; ++c)
    decays[c] = softmax_step(scores + c * format::kMaxPageTokens, (tokens + 15) / 16 * 16,
                             columns.max[first_column + c], columns.sum[first_column + c]);
  float* out = columns.out + first_column * head_dim;
  int d = 0;
  for (; d + 16 * kRawVectors <= head_dim; d += 16 * kRawVectors)
    raw_values<kCount, kRawVectors>(scratch.v + d, scores, tokens, head_dim, decays, out + d);
  for (; d < head_dim; d += 16) raw_values<kCount, 1>(scratch.v + d, scores, tokens, head_dim, decays, out + d);
}

static void attend_raw(const kvarn_layout& layout, const RawTile& raw, const int32_t* visible, const Columns& columns,
                       float cap, Scratch& scratch) {
  const int head_dim = layout.head_dim;
  int tokens = 0;
  for (int c = 0; c < columns.count; ++c) tokens = visible[c] > tokens ? visible[c] : tokens;
  constexpr int kAhead = 16;  // tokens; raw rows come from memory, at 32 cycles a token
  for (int t = 0; t < tokens; ++t) {
    const int later = t + kAhead < tokens ? t + kAhead : t;
    for (int d = 0; d < head_dim; d += 32) __builtin_prefetch(raw.k[later] + d), __builtin_prefetch(raw.v[later] + d);
    for (int d = 0; d < head_dim; d += 16) {
      store(scratch.k + t * head_dim + d, load_f16(raw.k[t] + d));
      store(scratch.v + t * head_dim + d, load_f16(raw.v[t] + d));
    }
  }
  int c = 0;
  for (; c + kColumnBlock <= columns.count; c += kColumnBlock)
    attend_raw_columns<kColumnBlock>(columns, c, visible, head_dim, cap, scratch);
  for (; c < columns.count; ++c) attend_raw_columns<1>(columns, c, visible, head_dim, cap, scratch);
}

}  // namespace kvarn::KVARN_CPU
