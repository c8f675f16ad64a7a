// SPDX-License-Identifier: Apache-2.0
// The current device: whether the kernels run on it, and how wide it is.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kvarn/kvarn.h"

namespace kvarn::cuda {

struct Device {
  int32_t multiprocessors;
};

// KVARN_CUDA_UNAVAILABLE with the reason if there is none that this build's kernels run on. Asked once per device.
kvarn_status find_device(Device* device);

// A launch's error as a status; also takes it off the runtime, so that the caller's next check does not find it.
kvarn_status status_of(cudaError_t error, const char* verb);

}  // namespace kvarn::cuda
