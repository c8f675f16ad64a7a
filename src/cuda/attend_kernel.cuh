// SPDX-License-Identifier: Apache-2.0
// attend: one launch for a whole batch. The plan cuts the work into a list for every team of every CTA; some warps load
// for the others, each team of those computes its list, and in the end the CTA folds what its lists were left with
// (docs/kernels.md).
#pragma once

#include "cuda/attend_compute.cuh"
#include "cuda/attend_division.cuh"
#include "cuda/attend_left.cuh"
#include "cuda/attend_load.cuh"
#include "cuda/attend_merge.cuh"

namespace kvarn::cuda {

template <int kWarps>
__device__ inline void begin_room(const AttendParameters& p, Room& room, int thread) {
  constexpr int kWords = sizeof p / 4;
  static_assert(sizeof p % 4 == 0 && kWords <= 32 * kWarps);
  if (thread < kWords)
    reinterpret_cast<uint32_t*>(&room.parameters)[thread] = reinterpret_cast<const uint32_t*>(&p)[thread];
  __syncthreads();  // racecheck reports the inits below as writes of the same addresses
  const auto lanes = static_cast<uint32_t>(32 * p.in.team_warps);
  if (thread < p.in.teams * p.in.key_depth)
    init_barrier(&room.keys_full[thread], kCopyArrivals), init_barrier(&room.keys_empty[thread], lanes);
  if (thread < p.in.teams * p.in.value_depth)
    init_barrier(&room.values_full[thread], kCopyArrivals), init_barrier(&room.values_empty[thread], lanes);
  if (thread < kWarps) init_barrier(&room.parts_full[thread], kCopyArrivals);
  publish_barriers();
  __syncthreads();
}

template <class S, int kQuads, int kComputingWarps>
__global__ void __launch_bounds__(32 * cta_warps(kQuads, kComputingWarps), 1)
    attend_kernel(const __grid_constant__ AttendParameters p) {
  constexpr int kWarps = cta_warps(kQuads, kComputingWarps), kLoaders = kWarps - kComputingWarps;
  extern __shared__ __align__(128) uint8_t shared[];
  const RoomOf<S> room{p, shared};
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = static_cast<int>(threadIdx.x) % 32;
  // A tile that this step packs may be read by any request: only in a step that packs none are tiles read early.
  const bool early = p.plan.header->packs == 0;
  begin_room<kWarps>(p, *room, static_cast<int>(threadIdx.x));
  const int role = role_of(warp, kComputingWarps, kWarps, p.in.team_warps);
  if (role >= kComputingWarps) {
    const int loader = role - kComputingWarps;
    Loader<S, kComputingWarps, kLoaders>(p, room, loader, lane, early).run();
    if (loader == 0) find_left(p, *room, lane);
    if (loader == 1) clear_absent<S>(p, lane);
  } else {
    compute<S, kQuads>(p, room, role, lane);
  }
  __syncthreads();
  Merge<S, kWarps>(p, room, warp, lane).run();
}

template <class S>
cudaError_t attend_shape(const AttendParameters& p, int32_t ctas, cudaStream_t stream) {
  constexpr int kWarps = computing_warps(S::layout, kQuadColumns), kMore = computing_warps(S::layout, 2 * kQuadColumns);
  static_assert(kMore != kMaxComputingWarps || (computing_warps(S::layout, 3 * kQuadColumns) == kMore &&
                                                computing_warps(S::layout, 5 * kQuadColumns) == kMore));
  auto* kernel = p.in.warps == kMore ? attend_kernel<S, 1, kMore> : attend_kernel<S, 1, kWarps>;
  if constexpr (S::head_dim <= kTwoQuadsHeadDim)
    if (p.in.warp_quads == 2) kernel = attend_kernel<S, 2, computing_warps(S::layout, kTwoQuadsColumns)>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.in.bytes);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(static_cast<unsigned>(ctas)),
                          dim3(static_cast<unsigned>(32 * cta_warps(p.in.warp_quads, p.in.warps))),
                          static_cast<size_t>(p.in.bytes), stream, p);
}

}  // namespace kvarn::cuda
