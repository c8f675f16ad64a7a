// SPDX-License-Identifier: Apache-2.0
// The current device, as launches need to know it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace kvarn::cuda {

struct Gpu {
  int32_t multiprocessors;
  int32_t shared_bytes;  // that a CTA may have: 227 KB of an sm_90, 163 of an sm_80, 99 of sm_86, sm_89 and sm_120
  bool dependent;  // programmatic dependent launch: what was compiled for sm_90 or later waits for the kernel before
};

// Asked once per device. cudaErrorNoKernelImageForDevice if it runs neither this build's machine code nor its PTX.
cudaError_t current_gpu(Gpu& gpu);

}  // namespace kvarn::cuda
