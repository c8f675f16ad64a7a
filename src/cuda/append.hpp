// SPDX-License-Identifier: Apache-2.0
// append and pack, per shape: declared here for the dispatch, defined in append_kernel.cuh, which instances/ includes.
#pragma once

#include "cuda/launch.hpp"

namespace kvarn::cuda {

template <class Shape>
cudaError_t append_shape(const Launch& launch, const kvarn_rows& k, const kvarn_rows& v, kvarn_encoder encoder,
                         const float* feedback, const float* balance, int64_t* replaced);

template <class Shape>
cudaError_t pack_shape(const Launch& launch, int32_t layers, kvarn_encoder encoder);

}  // namespace kvarn::cuda
