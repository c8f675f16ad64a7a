// SPDX-License-Identifier: Apache-2.0
// append: the shape's kernels.
#include "cuda/append.hpp"

#include "cuda/dispatch.hpp"

namespace kvarn::cuda {

cudaError_t append(const Launch& launch, const kvarn_rows& k, const kvarn_rows& v, kvarn_encoder encoder,
                   const float* feedback, const float* balance, int64_t* replaced) {
  return dispatch(launch.layout, [&](auto shape) {
    return append_shape<decltype(shape)>(launch, k, v, encoder, feedback, balance, replaced);
  });
}

}  // namespace kvarn::cuda
