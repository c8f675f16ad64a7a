// SPDX-License-Identifier: Apache-2.0
// encode: raw tile -> record.
namespace kvarn::KVARN_CPU {

static void write_section(const float* values, int length, uint8_t* record, int64_t offset) {
  uint16_t* out = reinterpret_cast<uint16_t*>(record + offset);
  for (int i = 0; i < length; i += 16) store_f16(out + i, load(values + i));
}

// [tokens][head_dim] -> [head_dim][tokens], 16 x 16 at a time to stay in few cache lines.
static void transpose(const float* in, int tokens, int head_dim, float* out) {
  for (int t0 = 0; t0 < tokens; t0 += 16)
    for (int d0 = 0; d0 < head_dim; d0 += 16)
      for (int d = d0; d < d0 + 16; ++d)
        for (int t = t0; t < t0 + 16; ++t) out[d * tokens + t] = in[t * head_dim + d];
}

static void encode(const kvarn_layout& layout, kvarn_encoder encoder, const float* feedback, const RawTile& raw,
                   uint8_t* record, Scratch& scratch) {
  const int tokens = layout.page_tokens, head_dim = layout.head_dim;
  float *k = scratch.k, *v_rows = scratch.work, *v = scratch.v;
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < head_dim; d += 16) {
      store(k + t * head_dim + d, load_f16(raw.k[t] + d));
      store(v_rows + t * head_dim + d, load_f16(raw.v[t] + d));
    }
  transpose(v_rows, tokens, head_dim, v);

  EncodedTile ek, ev;
  ek.codes = scratch.k_codes;
  ev.codes = scratch.v_codes;
  if (encoder == KVARN_VARNORM) {
    varnorm(k, head_dim, tokens, layout.k_bits, scratch.work, ek);
    varnorm(v, tokens, head_dim, layout.v_bits, scratch.work, ev);
  } else {
    TokenWeights weights;
    token_weights(k, v_rows, tokens, head_dim, weights);
    weighted(k, head_dim, tokens, layout.k_bits, true, weights, ek);
    if (feedback != nullptr) {
      transpose(k, tokens, head_dim, scratch.work);
      feed_back(scratch.work, head_dim, tokens, layout.k_bits, feedback, ek);
    }
    weighted(v, tokens, head_dim, layout.v_bits, false, weights, ev);
  }
  pack(ek.codes, tokens, head_dim, layout.k_bits, record + layout.k_codes);
  write_section(ek.s, head_dim, record, layout.k_scale);
  write_section(ek.z, head_dim, record, layout.k_zero);
  write_section(ek.c, tokens, record, layout.k_token);
  pack(ev.codes, head_dim, tokens, layout.v_bits, record + layout.v_codes);
  write_section(ev.c, head_dim, record, layout.v_channel);
  write_section(ev.s, tokens, record, layout.v_scale);
  write_section(ev.z, tokens, record, layout.v_zero);
}

}  // namespace kvarn::KVARN_CPU
