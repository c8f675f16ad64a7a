// SPDX-License-Identifier: Apache-2.0
#include "cuda/gpu.hpp"

#include <algorithm>
#include <array>
#include <climits>
#include <mutex>

namespace kvarn::cuda {
namespace {

// Compiled for the same architectures as all other kernels: if the device can load it, it can load them.
__global__ void probe() {}

#ifdef KVARN_CUDA_SHARED_LIMIT
constexpr int32_t kMostShared = KVARN_CUDA_SHARED_LIMIT;
#else
constexpr int32_t kMostShared = INT_MAX;
#endif

cudaError_t ask(int device, Gpu& gpu) {
  cudaFuncAttributes compiled;
  cudaError_t error = cudaFuncGetAttributes(&compiled, probe);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  gpu.shared_bytes = std::min(gpu.shared_bytes, kMostShared);
  gpu.dependent = compiled.ptxVersion >= 90;
  return error;
}

}  // namespace

cudaError_t current_gpu(Gpu& gpu) {
  static std::mutex mutex;
  static std::array<Gpu, 64> known{};  // multiprocessors 0: not asked yet
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (static_cast<size_t>(device) >= known.size()) return ask(device, gpu);
  const std::scoped_lock lock(mutex);
  if (known[device].multiprocessors == 0) {
    if (const cudaError_t error = ask(device, gpu); error != cudaSuccess) return error;
    known[device] = gpu;
  }
  gpu = known[device];
  return cudaSuccess;
}

}  // namespace kvarn::cuda
