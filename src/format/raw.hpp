// SPDX-License-Identifier: Apache-2.0
// Where raw tokens lie: a pure function of the position (specification sections 3 and 8).
#pragma once

#include <cstdint>

#include "kvarn/kvarn.h"

namespace kvarn::format {

struct RawPlace {
  int32_t page;  // index into the request's block-table row
  int32_t slot;
};

constexpr RawPlace raw_place(const kvarn_layout& layout, int32_t position) {
  const int32_t tile = position / layout.page_tokens, offset = position % layout.page_tokens,
                n = layout.raw_tokens_per_page;
  if (offset < n) return {tile + layout.pages_ahead, offset};
  return {tile + offset / n, offset % n};
}

// Are tile `tile`'s raw tokens in the pages once the sequence has `length` tokens?
constexpr bool raw_in_pages(const kvarn_layout& layout, int32_t tile, int32_t length) {
  return int64_t{length} - (int64_t{tile} + 1) * layout.page_tokens <= layout.raw_tokens_per_page;
}

// Must the `start mod G` older raw tokens of the tile that `start` lies in be staged before a step that ends at
// `length`?
constexpr bool must_stage(const kvarn_layout& layout, int32_t start, int32_t length) {
  return start % layout.page_tokens != 0 && !raw_in_pages(layout, start / layout.page_tokens, length);
}

// Element offset of K of (slot, head region); V lies raw_tokens_per_page * head_dim elements behind.
constexpr int64_t raw_k_offset(const kvarn_layout& layout, int32_t slot) { return int64_t{slot} * layout.head_dim; }
constexpr int64_t raw_v_offset(const kvarn_layout& layout, int32_t slot) {
  return (int64_t{layout.raw_tokens_per_page} + slot) * layout.head_dim;
}

// Block-table entries that a request of `length` tokens may use.
constexpr int64_t pages_of(const kvarn_layout& layout, int64_t length) {
  return (length + layout.page_tokens - 1) / layout.page_tokens + layout.pages_ahead;
}

}  // namespace kvarn::format
