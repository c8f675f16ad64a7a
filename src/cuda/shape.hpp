// SPDX-License-Identifier: Apache-2.0
// The shapes that have CUDA kernels, as compile-time constants: one table, from which dispatch is made.
#pragma once

#include "format/fragment.hpp"
#include "format/layout.hpp"

namespace kvarn::cuda {

template <int KBits, int VBits, int PageTokens, int HeadDim>
struct Shape {
  static constexpr int k_bits = KBits, v_bits = VBits, page_tokens = PageTokens, head_dim = HeadDim;
  static constexpr kvarn_layout layout = format::make_layout({KBits, VBits, PageTokens}, HeadDim, 1);
  static constexpr int record_bytes = static_cast<int>(layout.record_bytes);
  static constexpr int raw_tokens_per_page = layout.raw_tokens_per_page, pages_ahead = layout.pages_ahead;
  static constexpr format::Planes k_planes = format::make_planes(PageTokens, HeadDim, KBits);
  static constexpr format::Planes v_planes = format::make_planes(HeadDim, PageTokens, VBits);
};

// Calls body(Shape<...>{}) for the layout's shape; false if there are no kernels for it.
#define KVARN_CUDA_PRESETS(X) X(4, 2) X(4, 3) X(4, 4) X(3, 3) X(2, 2) X(8, 4)
#define KVARN_CUDA_HEAD_DIMS(X, ...) X(64, __VA_ARGS__) X(96, __VA_ARGS__) X(128, __VA_ARGS__) X(256, __VA_ARGS__)

constexpr bool has_kernels(const kvarn_layout& l) {
  bool preset = false;
#define KVARN_MATCH(k, v) preset = preset || (l.k_bits == k && l.v_bits == v);
  KVARN_CUDA_PRESETS(KVARN_MATCH)
#undef KVARN_MATCH
  return preset && (l.head_dim == 64 || l.head_dim == 96 || l.head_dim == 128 || l.head_dim == 256);
}

}  // namespace kvarn::cuda
