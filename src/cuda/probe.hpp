// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

namespace kvarn::cuda {

// Can the current device run this build's machine code or its PTX?
cudaError_t probe_kernel_image();

}  // namespace kvarn::cuda
