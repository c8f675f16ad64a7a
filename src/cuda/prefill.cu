// SPDX-License-Identifier: Apache-2.0
// The prefill pages: the shape's kernel.
#include "cuda/dispatch.hpp"
#include "cuda/expand.hpp"
#include "cuda/launch.hpp"

namespace kvarn::cuda {

cudaError_t prefill_pages(const Launch& launch, const kvarn_cuda_prefill& prefill, const kvarn_rows_out& k,
                          const kvarn_rows_out& v) {
  const PrefillArguments arguments{launch.pages,           launch.step.batch, prefill,
                                   launch.plan(),          Output::of(k),     Output::of(v),
                                   launch.layout.kv_heads, launch.step.tokens};
  return dispatch(launch.layout, [&](auto shape) { return prefill_shape<decltype(shape)>(arguments, launch.stream); });
}

}  // namespace kvarn::cuda
