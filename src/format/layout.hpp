// SPDX-License-Identifier: Apache-2.0
// The byte layout of a record and a page, written once (specification sections 3 and 4). Everything else derives from
// it.
#pragma once

#include "format/presets.hpp"
#include "kvarn/kvarn.h"

namespace kvarn::format {

constexpr kvarn_layout make_layout(const Preset& preset, int head_dim, int kv_heads) {
  const int64_t tokens = preset.page_tokens, channels = head_dim;
  kvarn_layout out{};
  out.format_version = KVARN_FORMAT_VERSION;
  out.k_bits = preset.k_bits;
  out.v_bits = preset.v_bits;
  out.page_tokens = preset.page_tokens;
  out.head_dim = head_dim;
  out.kv_heads = kv_heads;

  int64_t offset = 0;
  const auto section = [&offset](int64_t bytes) {
    const int64_t start = offset;
    offset += bytes;
    return start;
  };
  out.k_codes = section(tokens * channels * preset.k_bits / 8);
  out.k_scale = section(2 * channels);
  out.k_zero = section(2 * channels);
  out.k_token = section(2 * tokens);
  out.v_codes = section(tokens * channels * preset.v_bits / 8);
  out.v_channel = section(2 * channels);
  out.v_scale = section(2 * tokens);
  out.v_zero = section(2 * tokens);
  out.record_bytes = offset;
  out.page_bytes = offset * kv_heads;

  const int64_t raw_token_bytes = 2 * channels * 2;  // K and V of one head, f16
  out.raw_tokens_per_page = static_cast<int32_t>(out.record_bytes / raw_token_bytes);
  out.pages_ahead = (preset.page_tokens + out.raw_tokens_per_page - 1) / out.raw_tokens_per_page;
  return out;
}

// The layouts that the documents quote.
static_assert(make_layout({4, 2, 128}, 128, 8).record_bytes == 13824);
static_assert(make_layout({4, 2, 128}, 128, 8).raw_tokens_per_page == 27);
static_assert(make_layout({4, 2, 128}, 128, 8).pages_ahead == 5);
static_assert(make_layout({4, 2, 128}, 64, 3).page_bytes == 21888);
static_assert(make_layout({2, 2, 128}, 128, 1).pages_ahead == 7);

constexpr bool every_section_is_aligned() {
  for (int k : kBits)
    for (int v : kBits)
      for (int g : kPageTokens)
        for (int d : kHeadDims) {
          const kvarn_layout l = make_layout({k, v, g}, d, 1);
          for (int64_t at :
               {l.k_scale, l.k_zero, l.k_token, l.v_codes, l.v_channel, l.v_scale, l.v_zero, l.record_bytes})
            if (at % 16 != 0) return false;
        }
  return true;
}
static_assert(every_section_is_aligned());

}  // namespace kvarn::format
