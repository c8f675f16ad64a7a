// SPDX-License-Identifier: Apache-2.0
// The scalar target: the reference. It reads like docs/specification.md; the SIMD targets are tested against it, and
// KVARN_TARGET=scalar forces it anywhere.
#include <algorithm>
#include <cmath>

#include "codec/rows.hpp"
#include "codec/sum.hpp"
#include "codec/tile.hpp"
#include "target/kernels.hpp"

namespace kvarn {
namespace {

using codec::Encoded;
using codec::Side;
using codec::Tile;

constexpr int kD = format::kMaxHeadDim;

const uint16_t* section(const uint8_t* record, int64_t offset) {
  return reinterpret_cast<const uint16_t*>(record + offset);
}

void write_section(const float* values, int count, uint8_t* record, int64_t offset) {
  uint16_t* out = reinterpret_cast<uint16_t*>(record + offset);
  for (int i = 0; i < count; ++i) out[i] = format::float_to_f16(values[i]);
}

int64_t rotate_raw(const void* in, kvarn_dtype dtype, int head_dim, const float* balance, uint16_t* out) {
  float x[kD];
  int64_t replaced = 0;
  for (int d = 0; d < head_dim; ++d) {
    x[d] = codec::load(in, dtype, d);
    if (balance != nullptr) x[d] /= balance[d];
    replaced += codec::sanitize(x[d]);
  }
  codec::rotate(x, head_dim);
  for (int d = 0; d < head_dim; ++d) {
    const uint16_t half = format::float_to_f16_saturating(x[d]);
    out[d] = half == 0x8000 ? 0 : half;  // a zero has no sign
  }
  return replaced;
}

void store(const float* in, int count, void* out, kvarn_dtype dtype) {
  for (int i = 0; i < count; ++i) codec::store(in[i], out, dtype, i);
}

void rotate(const void* in, kvarn_dtype in_dtype, int head_dim, void* out, kvarn_dtype out_dtype) {
  float x[kD];
  for (int d = 0; d < head_dim; ++d) x[d] = codec::load(in, in_dtype, d);
  codec::rotate(x, head_dim);
  store(x, head_dim, out, out_dtype);
}

bool load_query(const void* in, kvarn_dtype dtype, int head_dim, const float* balance, float factor, float* q) {
  for (int d = 0; d < head_dim; ++d) q[d] = codec::load(in, dtype, d) * (balance != nullptr ? balance[d] : 1);
  codec::rotate(q, head_dim);
  bool finite = true;
  for (int d = 0; d < head_dim; ++d) {
    q[d] = q[d] * factor;
    finite = finite && std::fabs(q[d]) <= 3e38f;
  }
  return finite;
}

void encode(const kvarn_layout& layout, kvarn_encoder encoder, const float* feedback, const RawTile& raw,
            uint8_t* record, Scratch& scratch) {
  const int tokens = layout.page_tokens, head_dim = layout.head_dim;
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < head_dim; ++d) {
      scratch.k[t * head_dim + d] = format::f16_to_float(raw.k[t][d]);
      scratch.v[t * head_dim + d] = format::f16_to_float(raw.v[t][d]);
    }
  const Tile k{Side::kKeys, head_dim, tokens, layout.k_bits, scratch.k};
  const Tile v{Side::kValues, tokens, head_dim, layout.v_bits, scratch.v};
  Encoded ek{{}, {}, {}, scratch.k_codes}, ev{{}, {}, {}, scratch.v_codes};
  if (encoder == KVARN_VARNORM) {
    codec::varnorm(k, ek, scratch.work);
    codec::varnorm(v, ev, scratch.work);
  } else {
    const codec::TokenWeights weights = codec::token_weights(scratch.k, scratch.v, tokens, head_dim);
    codec::weighted(k, weights, ek);
    if (feedback != nullptr) codec::feed_back(k, feedback, ek);
    codec::weighted(v, weights, ev);
  }
  codec::pack(ek.codes, tokens, head_dim, layout.k_bits, record + layout.k_codes);
  write_section(ek.s, head_dim, record, layout.k_scale);
  write_section(ek.z, head_dim, record, layout.k_zero);
  write_section(ek.c, tokens, record, layout.k_token);
  codec::pack(ev.codes, head_dim, tokens, layout.v_bits, record + layout.v_codes);
  write_section(ev.c, head_dim, record, layout.v_channel);
  write_section(ev.s, tokens, record, layout.v_scale);
  write_section(ev.z, tokens, record, layout.v_zero);
}

void expand(const kvarn_layout& layout, const uint8_t* record, float* k, float* v, Scratch& scratch) {
  const int tokens = layout.page_tokens, head_dim = layout.head_dim;
  const auto value = [record](int64_t offset, int i) { return format::f16_to_float(section(record, offset)[i]); };
  uint8_t *k_codes = scratch.k_codes, *v_codes = scratch.v_codes;
  codec::unpack(record + layout.k_codes, tokens, head_dim, layout.k_bits, k_codes);
  codec::unpack(record + layout.v_codes, head_dim, tokens, layout.v_bits, v_codes);
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < head_dim; ++d) {
      const float k_code = k_codes[t * head_dim + d], v_code = v_codes[d * tokens + t];
      k[t * head_dim + d] = (k_code * value(layout.k_scale, d) + value(layout.k_zero, d)) * value(layout.k_token, t);
      v[t * head_dim + d] = (v_code * value(layout.v_scale, t) + value(layout.v_zero, t)) * value(layout.v_channel, d);
    }
}

// One column over the first `visible` tokens of dequantized or raw k, v [tokens][head_dim].
void attend_tokens(const float* k, const float* v, int visible, int head_dim, const Columns& columns, int column,
                   float cap) {
  const float* q = columns.q + column * head_dim;
  float* out = columns.out + column * head_dim;
  float score[format::kMaxPageTokens];
  float top = columns.max[column];
  for (int t = 0; t < visible; ++t) {
    const float dot = codec::sum(head_dim, [&](int d) { return q[d] * k[t * head_dim + d]; });
    score[t] = codec::larger(cap > 0 ? cap * std::tanh(dot / cap) : dot, Columns::kLowest);
    top = codec::larger(top, score[t]);
  }
  const float decay = std::exp2(columns.max[column] - top);
  float total = 0;
  for (int d = 0; d < head_dim; ++d) out[d] *= decay;
  for (int t = 0; t < visible; ++t) {
    const float p = std::exp2(score[t] - top);
    total += p;
    for (int d = 0; d < head_dim; ++d) out[d] += p * v[t * head_dim + d];
  }
  columns.sum[column] = columns.sum[column] * decay + total;
  columns.max[column] = top;
}

void attend_packed(const kvarn_layout& layout, const uint8_t* record, const uint8_t*, const Columns& columns, float cap,
                   Scratch& scratch) {
  expand(layout, record, scratch.k, scratch.v, scratch);
  for (int c = 0; c < columns.count; ++c)
    attend_tokens(scratch.k, scratch.v, layout.page_tokens, layout.head_dim, columns, c, cap);
}

void attend_raw(const kvarn_layout& layout, const RawTile& raw, const int32_t* visible, const Columns& columns,
                float cap, Scratch& scratch) {
  const int head_dim = layout.head_dim, tokens = *std::max_element(visible, visible + columns.count);
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < head_dim; ++d) {
      scratch.k[t * head_dim + d] = format::f16_to_float(raw.k[t][d]);
      scratch.v[t * head_dim + d] = format::f16_to_float(raw.v[t][d]);
    }
  for (int c = 0; c < columns.count; ++c) attend_tokens(scratch.k, scratch.v, visible[c], head_dim, columns, c, cap);
}

void fold(int head_dim, const Columns& total, const Columns& part) {
  for (int c = 0; c < total.count; ++c) {
    const float top = codec::larger(total.max[c], part.max[c]);
    const float a = std::exp2(total.max[c] - top), b = std::exp2(part.max[c] - top);
    for (int d = c * head_dim; d < (c + 1) * head_dim; ++d) total.out[d] = total.out[d] * a + part.out[d] * b;
    total.sum[c] = total.sum[c] * a + part.sum[c] * b;
    total.max[c] = top;
  }
}

void finish(const Columns& columns, int column, int head_dim, void* out, kvarn_dtype dtype) {
  float x[kD];
  const float inverse = 1.0f / columns.sum[column];
  for (int d = 0; d < head_dim; ++d) x[d] = columns.out[column * head_dim + d] * inverse;
  codec::rotate(x, head_dim);
  store(x, head_dim, out, dtype);
}

}  // namespace

const Kernels* scalar_kernels() {
  static constexpr Kernels kernels{"scalar", rotate_raw,    rotate,     load_query, store, encode,
                                   expand,   attend_packed, attend_raw, fold,       finish};
  return &kernels;
}

}  // namespace kvarn
