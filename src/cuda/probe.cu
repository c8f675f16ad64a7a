// SPDX-License-Identifier: Apache-2.0
// An empty kernel, compiled for the same architectures as all others: if the device can load it, it can load them.
#include "cuda/probe.hpp"

namespace kvarn::cuda {
namespace {
__global__ void probe() {}
}  // namespace

cudaError_t probe_kernel_image() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe);
}

}  // namespace kvarn::cuda
