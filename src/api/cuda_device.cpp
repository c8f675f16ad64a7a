// SPDX-License-Identifier: Apache-2.0
#include "api/cuda_device.hpp"

#include "api/error.hpp"

namespace kvarn::cuda {
namespace {

constexpr int kOldest = 80;  // compute capability, major and minor digit

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : 0;
}

kvarn_status why_not(cudaError_t error) {
  (void)cudaGetLastError();
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    (void)cudaGetLastError();
    return fail(KVARN_CUDA_UNAVAILABLE, "no CUDA device can be used: %s", cudaGetErrorString(error));
  }
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (capability < kOldest)
    return fail(KVARN_CUDA_UNAVAILABLE, "CUDA device %d has compute capability %d.%d; kvarn's kernels need 8.0 or more",
                device, capability / 10, capability % 10);
  return fail(KVARN_CUDA_UNAVAILABLE,
              "CUDA device %d (compute capability %d.%d) cannot run kernels built for %s (%s); build kvarn with "
              "-DKVARN_CUDA_ARCHITECTURES=%d",
              device, capability / 10, capability % 10, KVARN_CUDA_ARCHITECTURES, cudaGetErrorString(error),
              capability);
}

}  // namespace

kvarn_status find_gpu(Gpu* gpu) {
  const cudaError_t error = current_gpu(*gpu);
  return error == cudaSuccess ? KVARN_OK : why_not(error);
}

kvarn_status status_of(cudaError_t error, const char* verb) {
  if (error == cudaSuccess) return KVARN_OK;
  (void)cudaGetLastError();
  return fail(KVARN_CUDA_ERROR, "%s: CUDA says \"%s\" (%s)", verb, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace kvarn::cuda
