// SPDX-License-Identifier: Apache-2.0
// What every kernel needs of the machine: dependent launches, and rows of any dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/gpu.hpp"
#include "kvarn/kvarn.h"

namespace kvarn::cuda {

// Programmatic dependent launch: wait until the kernel before has finished and its writes are visible; let the next one
// start its prologue. Trigger only after waiting, so that what is visible to a kernel is visible to all behind it.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Adds, and orders: what this CTA's threads wrote before a __syncthreads() is visible to whoever adds later and then reads.
__device__ inline uint32_t add_and_fence(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return before;
}

// Element i of a row of any dtype.
__device__ inline float load_element(const void* row, kvarn_dtype dtype, int64_t i) {
  if (dtype == KVARN_FLOAT16) return __half2float(static_cast<const __half*>(row)[i]);
  if (dtype == KVARN_BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(row)[i]);
  return static_cast<const float*>(row)[i];
}
__device__ inline void store_element(float value, void* row, kvarn_dtype dtype, int64_t i) {
  if (dtype == KVARN_FLOAT16)
    static_cast<__half*>(row)[i] = __float2half_rn(value);
  else if (dtype == KVARN_BFLOAT16)
    static_cast<__nv_bfloat16*>(row)[i] = __float2bfloat16_rn(value);
  else
    static_cast<float*>(row)[i] = value;
}

// Launches with programmatic stream serialization, if the kernels wait for one another: the kernel may begin while the
// one before it ends.
template <class... Parameters, class... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t stream, Arguments... arguments) {
  Gpu gpu;
  if (const cudaError_t error = current_gpu(gpu); error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = gpu.dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace kvarn::cuda
