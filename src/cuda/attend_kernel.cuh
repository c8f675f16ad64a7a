// SPDX-License-Identifier: Apache-2.0
// attend: one launch for a whole batch. A CTA takes its share of the pieces (plan.hpp): two warps load, teams of warps
// compute, a warp folds their results in order, a warp rotates queries ahead (docs/kernels.md).
#pragma once

#include "cuda/attend_compute.cuh"
#include "cuda/attend_fold.cuh"
#include "cuda/attend_load.cuh"
#include "cuda/attend_queries.cuh"
#include "cuda/launch.hpp"

namespace kvarn::cuda {

template <class S>
__device__ inline void begin_room(const AttendParameters& p, Room<S>& room, int thread) {
  const auto lanes = static_cast<uint32_t>(32 * p.team_warps);
  if (thread < p.teams * p.key_depth)
    init_barrier(&room.keys_full[thread], kCopyArrivals), init_barrier(&room.keys_empty[thread], lanes);
  if (thread < p.teams * p.value_depth)
    init_barrier(&room.values_full[thread], kCopyArrivals), init_barrier(&room.values_empty[thread], lanes);
  if (thread < p.results)
    init_barrier(&room.results_full[thread], lanes), init_barrier(&room.results_empty[thread], 32);
  if (thread < p.teams) init_barrier(&room.queries_full[thread], 32), init_barrier(&room.queries_empty[thread], 32);
  if (thread == 0) room.merges.count = 0;
  publish_barriers();
  __syncthreads();
}

template <class S>
__global__ void __launch_bounds__(32 * kWarps, 1) attend_kernel(const __grid_constant__ AttendParameters p) {
  extern __shared__ __align__(128) uint8_t shared[];
  Room<S>& room = *reinterpret_cast<Room<S>*>(shared);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = static_cast<int>(threadIdx.x) % 32;
  const Cut cut = p.plan.cuts[blockIdx.x];
  // A tile that this step packs may be read by any request: only in a step that packs none are tiles read early.
  const bool early = p.plan.header->packs == 0;
  begin_room(p, room, static_cast<int>(threadIdx.x));
  if (warp == kKeyWarp) {
    Loader<S, true>(p, cut, room, lane, early).run();
  } else if (warp == kValueWarp) {
    Loader<S, false>(p, cut, room, lane, early).run();
  } else {
    wait_for_previous();
    if (warp < kComputingWarps) {
      compute<S>(p, cut, room, warp, lane);
    } else if (warp == kFoldingWarp) {
      let_next_start();
      Folder<S>(p, cut, room, lane).run();
    } else {
      prepare_queries<S>(p, cut, room, lane);
      clear_absent<S>(p, lane);
    }
  }
  __syncthreads();
  for (int i = 0; i < room.merges.count; ++i) {
    const MergeList::Segment segment = room.merges.segments[i];
    for (int w = 0; w < p.team_warps; ++w) merge<S>(p, segment, w, room, warp, lane);
    __syncthreads();
    if (warp < p.team_warps) finish<S>(p, p.plan.blocks[segment.block], segment.head, warp, room.level(p, 3, warp), lane);
    __syncthreads();
  }
}

// How a CTA of this device is divided: as many teams as fit, then as many steps in flight. columns: of a block.
template <class S>
cudaError_t configure(AttendParameters& p, int32_t columns, int64_t& bytes) {
  using R = Room<S>;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  p.team_warps = columns / kWarpColumns;
  const auto fits = [&](int teams, int key_depth, int value_depth) {
    AttendParameters wanted = p;
    wanted.teams = teams, wanted.key_depth = key_depth, wanted.value_depth = value_depth, wanted.results = teams + 1;
    const int64_t needed = R::slots_at(teams, p.team_warps, wanted.results) + slots_bytes<S>(wanted);
    if (needed > limit || teams * key_depth > kMaxSlots) return false;
    p = wanted, bytes = needed;
    return true;
  };
  int teams = kComputingWarps / p.team_warps;
  while (teams > 0 && !fits(teams, 1, 1)) --teams;
  if (teams == 0) return cudaErrorInvalidConfiguration;
  // K parts first: while the one is computed the next is there.
  for (int depth = 1; depth < kPieceTiles; ++depth)
    if (!fits(teams, depth + 1, depth) || !fits(teams, depth + 1, depth + 1)) break;
  // What the slots leave goes to results: a team that is ahead need not wait.
  while (p.results < kMaxResults && bytes + p.team_warps * R::kStoredBytes + 128 <= limit)
    ++p.results, bytes = R::slots_at(p.teams, p.team_warps, p.results) + slots_bytes<S>(p);
  // Merging takes the parts of at least one CTA at a time, and of no more than it has threads.
  return p.max_parts <= std::min<int64_t>(merge_bytes<S>(p) / kMergeBytes<S>, 32 * kWarps) ? cudaSuccess
                                                                                       : cudaErrorInvalidConfiguration;
}

// columns: of a block, 4, 8 or 16.
template <class S>
cudaError_t attend_shape(AttendParameters p, int32_t columns, int32_t ctas, cudaStream_t stream) {
  int64_t bytes = 0;
  cudaError_t error = configure<S>(p, columns, bytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(attend_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  return launch_dependent(attend_kernel<S>, dim3(static_cast<unsigned>(ctas)), dim3(32 * kWarps),
                          static_cast<size_t>(bytes), stream, p);
}

}  // namespace kvarn::cuda
