// SPDX-License-Identifier: Apache-2.0
// The shapes that have CUDA kernels, as compile-time constants.
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

// What there are kernels for, in tiles of 128 and of 64 tokens. cmake/Cuda.cmake reads these two lines.
#define KVARN_CUDA_PRESETS(X) X(8, 4) X(4, 4) X(4, 3) X(3, 3) X(4, 2) X(2, 2)
#define KVARN_CUDA_HEAD_DIMS(X) X(64) X(96) X(128) X(256)

constexpr bool has_kernels(const kvarn_layout& l) {
#define KVARN_PRESET(k, v) || (l.k_bits == k && l.v_bits == v)
#define KVARN_HEAD_DIM(d) || l.head_dim == d
  return (false KVARN_CUDA_PRESETS(KVARN_PRESET)) && (false KVARN_CUDA_HEAD_DIMS(KVARN_HEAD_DIM));
#undef KVARN_PRESET
#undef KVARN_HEAD_DIM
}
// "k8v4, .., " and " 64 ..", for messages.
#define KVARN_PRESET(k, v) "k" #k "v" #v ", "
#define KVARN_HEAD_DIM(d) " " #d
inline constexpr const char *kPresetNames = KVARN_CUDA_PRESETS(KVARN_PRESET),
                            *kHeadDimNames = KVARN_CUDA_HEAD_DIMS(KVARN_HEAD_DIM);
#undef KVARN_PRESET
#undef KVARN_HEAD_DIM

}  // namespace kvarn::cuda
