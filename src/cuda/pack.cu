// SPDX-License-Identifier: Apache-2.0
// pack: where the layers are goes to the workspace, then the shape's kernel.
#include <algorithm>

#include "cuda/append.hpp"
#include "cuda/device.cuh"
#include "cuda/dispatch.hpp"

namespace kvarn::cuda {
namespace {

// By value, since a captured graph outlives what the caller has them in; a kernel's parameters may take 4 KB.
struct SomeLayers {
  kvarn_cuda_layer layer[96];
};

__global__ void put_layers(const __grid_constant__ SomeLayers from, kvarn_cuda_layer* to, int32_t count) {
  wait_for_previous();
  let_next_start();
  if (threadIdx.x < count) to[threadIdx.x] = from.layer[threadIdx.x];
}

}  // namespace

cudaError_t pack(const Launch& launch, const kvarn_cuda_layer* layers, int32_t count, kvarn_encoder encoder) {
  constexpr int32_t kSome = std::size(SomeLayers{}.layer);
  for (int32_t first = 0; first < count; first += kSome) {
    SomeLayers some{};
    const int32_t here = std::min(count - first, kSome);
    std::copy_n(layers + first, here, some.layer);
    const cudaError_t error =
        launch_dependent(put_layers, dim3(1), dim3(kSome), 0, launch.stream, some, launch.plan().layers + first, here);
    if (error != cudaSuccess) return error;
  }
  return dispatch(launch.layout, [&](auto shape) { return pack_shape<decltype(shape)>(launch, count, encoder); });
}

}  // namespace kvarn::cuda
