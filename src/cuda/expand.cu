// SPDX-License-Identifier: Apache-2.0
// expand: the shape's kernel.
#include "cuda/expand.hpp"

#include "cuda/dispatch.hpp"
#include "cuda/launch.hpp"

namespace kvarn::cuda {

cudaError_t expand(const kvarn_layout& layout, const kvarn_pages& pages, const kvarn_batch& batch,
                   const kvarn_rows_out& k, const kvarn_rows_out& v, cudaStream_t stream) {
  const ExpandArguments arguments{pages,          batch, Output::of(k), Output::of(v), k.tokens / layout.page_tokens,
                                  layout.kv_heads};
  return dispatch(layout, [&](auto shape) { return expand_shape<decltype(shape)>(arguments, stream); });
}

}  // namespace kvarn::cuda
