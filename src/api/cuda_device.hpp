// SPDX-License-Identifier: Apache-2.0
// The current device: whether the kernels run on it, and if not, why.
#pragma once

#include "cuda/gpu.hpp"
#include "kvarn/kvarn.h"

namespace kvarn::cuda {

// KVARN_CUDA_UNAVAILABLE with the reason if there is none that this build's kernels run on.
kvarn_status find_gpu(Gpu* gpu);

// A launch's error as a status; also takes it off the runtime, so that the caller's next check does not find it.
kvarn_status status_of(cudaError_t error, const char* verb);

}  // namespace kvarn::cuda
