// SPDX-License-Identifier: Apache-2.0
#include "api/cuda_device.hpp"

#include <array>
#include <atomic>

#include "api/error.hpp"
#include "cuda/probe.hpp"

namespace kvarn::cuda {
namespace {

constexpr int kOldest = 80;  // compute capability, major and minor digit

int32_t attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : 0;
}

kvarn_status unavailable(const char* what, cudaError_t error) {
  (void)cudaGetLastError();
  return fail(KVARN_CUDA_UNAVAILABLE, "%s: %s", what, cudaGetErrorString(error));
}

kvarn_status examine(int device, Device* out) {
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (capability < kOldest)
    return fail(KVARN_CUDA_UNAVAILABLE, "CUDA device %d has compute capability %d.%d; kvarn's kernels need 8.0 or more",
                device, capability / 10, capability % 10);
  if (const cudaError_t error = probe_kernel_image(); error != cudaSuccess) {
    (void)cudaGetLastError();
    return fail(KVARN_CUDA_UNAVAILABLE,
                "CUDA device %d (compute capability %d.%d) cannot run kernels built for %s (%s); build kvarn with "
                "-DKVARN_CUDA_ARCHITECTURES=%d",
                device, capability / 10, capability % 10, KVARN_CUDA_ARCHITECTURES, cudaGetErrorString(error),
                capability);
  }
  out->multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  return KVARN_OK;
}

}  // namespace

kvarn_status find_device(Device* out) {
  static std::array<std::atomic<int32_t>, 64> known{};  // multiprocessors; 0: not asked yet
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess)
    return unavailable("no CUDA device can be used", error);
  const auto index = static_cast<size_t>(device);
  if (index < known.size() && known[index] != 0) {
    out->multiprocessors = known[index];
    return KVARN_OK;
  }
  if (const kvarn_status status = examine(device, out); status != KVARN_OK) return status;
  if (index < known.size()) known[index] = out->multiprocessors;
  return KVARN_OK;
}

kvarn_status status_of(cudaError_t error, const char* verb) {
  if (error == cudaSuccess) return KVARN_OK;
  (void)cudaGetLastError();
  return fail(KVARN_CUDA_ERROR, "%s: CUDA says \"%s\" (%s)", verb, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace kvarn::cuda
