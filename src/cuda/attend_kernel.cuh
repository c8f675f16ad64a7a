// SPDX-License-Identifier: Apache-2.0
// attend: one launch for a whole batch. A CTA takes its share of the pieces (plan.hpp); computing warps run one piece each
// in turn, a folding warp puts the pieces in order, a query warp rotates queries ahead (docs/kernels.md).
#pragma once

#include "cuda/attend_fold.cuh"
#include "cuda/attend_queries.cuh"
#include "cuda/launch.hpp"

namespace kvarn::cuda {

inline constexpr int kMaxSlots = 16, kMaxFolds = 16, kMaxQuerySlots = 4;
// Computing warps. With the two others 12 warps may have 168 registers each, 8 warps 255.
template <int kTiles>
inline constexpr int kMaxWarps = kTiles == 1 ? 8 : 6;

// Shared memory of a CTA.
template <class S, int kTiles>
struct Room {
  using Stored = StoredState<S::head_dim, kTiles>;
  Barrier keys[kMaxSlots], values[kMaxSlots];                 // of the slots: copies have arrived
  Barrier results_full[kMaxFolds], results_empty[kMaxFolds];  // computing warps -> folding warp
  Barrier queries_full[kMaxQuerySlots], queries_empty[kMaxQuerySlots];
  float2 scales[kMaxQuerySlots][4 * kTiles];
  MergeList merges;
  int32_t parts;
  alignas(128) Stored levels[3];
  // then: queries [query_slots][4 kTiles][D] f32, results [folds], slots

  // Offsets from the start, not pointers made of integers: the compiler must see that they stay in shared memory.
  static constexpr int query_bytes() { return 16 * kTiles * S::head_dim; }
  static constexpr int results_at(int query_slots) { return static_cast<int>(sizeof(Room)) + query_slots * query_bytes(); }
  static constexpr int slots_at(int query_slots, int folds) {
    return (results_at(query_slots) + folds * static_cast<int>(sizeof(Stored)) + 127) / 128 * 128;
  }
  __device__ uint8_t* bytes() { return reinterpret_cast<uint8_t*>(this); }
  __device__ float* queries() { return reinterpret_cast<float*>(bytes() + sizeof(Room)); }
  __device__ Stored* results(const AttendParameters& p) {
    return reinterpret_cast<Stored*>(bytes() + results_at(p.query_slots));
  }
  __device__ uint8_t* slots(const AttendParameters& p) { return bytes() + slots_at(p.query_slots, p.folds); }
};

// Which tokens a lane's columns see; only tiles at an edge need it.
template <class S, int kTiles, int kRowTiles, class Token>
__device__ inline void hide(const AttendParameters& p, int block, bool raw, int tile, int lane,
                            float (&y)[kTiles][kRowTiles][2], Token token) {
  const BlockPlan& b = p.plan.blocks[block];
#pragma unroll
  for (int nt = 0; nt < kTiles; ++nt) {
    const int position = b.start + (b.first_column + 4 * nt + (lane & 3)) / p.group;
    const int own = position / S::page_tokens;
    const int low = p.window > 0 ? position - p.window + 1 : 0;
    // of a tile a column sees the packed form if it lies before its own, the raw form if it is its own
    const int end = raw ? (own == tile ? position + 1 : 0) : (tile < own ? (tile + 1) * S::page_tokens : 0);
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = token(t, h);
        if (at < low || at >= end) y[nt][t][h] = -INFINITY;
      }
  }
}

template <int kTiles, int kRowTiles>
__device__ inline void soft_cap(float cap, float inverse, float (&y)[kTiles][kRowTiles][2]) {
#pragma unroll
  for (int nt = 0; nt < kTiles; ++nt)
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h)  // inverse: 2 log2(e) / cap; tanh x = 1 - 2 / (e^2x + 1)
        y[nt][t][h] = cap - cap * __fdividef(2.0f, exp2_fast(y[nt][t][h] * inverse) + 1.0f);
}

template <class S, int kTiles>
__device__ void compute(const AttendParameters& p, const Cut& cut, Room<S, kTiles>& room, int warp, int lane,
                        bool early) {
  const int active = min(p.warps, cut.units);
  if (warp >= active) return;
  // Warps without work leave their slots to the others.
  const int depth = min(p.slots / active, kPieceTiles);
  uint8_t* slots = room.slots(p) + warp * depth * Walk<S>::kSlotBytes;
  Barrier *keys = room.keys + warp * depth, *values = room.values + warp * depth;
  Walk<S> now, ahead;
  now.begin(p, cut, warp, lane);
  ahead = now;
  if (!early) wait_for_previous();
  for (int i = 0; i < depth && ahead.more; ++i) {
    if (early && ahead.raw()) wait_for_previous();
    ahead.template load<true>(p, slots + i * Walk<S>::kSlotBytes, keys + i, lane);
    ahead.template load<false>(p, slots + i * Walk<S>::kSlotBytes, values + i, lane);
    ahead.advance(p, active, cut.units, lane);
  }
  if (early) wait_for_previous();

  State<S::head_dim, kTiles> state;
  int slot = 0, result = warp, query_slot = -1, segment = -1;
  uint32_t parity = 0, result_parity = 1, query_parity = 0;
  while (now.more) {
    while (segment < now.at.segment) {  // also those that this warp skips: a barrier's parity tells one round from the next
      ++segment;
      if (++query_slot == p.query_slots) query_slot = 0, query_parity ^= 1;
      wait(&room.queries_full[query_slot], query_parity);
    }
    const float* queries = room.queries() + query_slot * 4 * kTiles * S::head_dim;
    const bool raw = now.raw();
    state.clear();
    for (int last = now.steps; now.step < last;) {
      uint8_t* stretch = slots + slot * Walk<S>::kSlotBytes;
      const int tile = now.tile + (raw ? 0 : now.step), position = tile * S::page_tokens;
      const auto refill_keys = [&] {
        __syncwarp();
        if (ahead.more) ahead.template load<true>(p, stretch, keys + slot, lane);
      };
      wait(keys + slot, parity);
      if (!raw) {
        float y[kTiles][S::page_tokens / 16][2];
        packed_scores<S, kTiles>(stretch, queries, lane, y);
        refill_keys();
        if (p.cap > 0) soft_cap(p.cap, p.cap_inverse, y);
        if (now.edge)
          hide<S>(p, now.at.block, false, tile, lane, y, [&](int t, int h) { return position + 16 * t + 2 * (lane >> 2) + h; });
        wait(values + slot, parity);
        packed_outputs<S, kTiles>(stretch + Walk<S>::kValueOffset - Walk<S>::kKeyBytes, y, lane, state);
      } else {
        float y[kTiles][1][2];
        raw_scores<S, kTiles>(stretch, queries, room.scales[query_slot], lane, y);
        refill_keys();
        if (p.cap > 0) soft_cap(p.cap, p.cap_inverse, y);
        const int first = position + now.first + now.step * kRawStep;
        hide<S>(p, now.at.block, true, tile, lane, y, [&](int, int h) { return first + (lane >> 2) + 8 * h; });
        wait(values + slot, parity);
        raw_outputs<S, kTiles>(stretch + Walk<S>::kValueOffset, y, lane, state);
      }
      __syncwarp();
      if (ahead.more) {
        ahead.template load<false>(p, stretch, values + slot, lane);
        ahead.advance(p, active, cut.units, lane);
      }
      if (++slot == depth) slot = 0, parity ^= 1;
      if (now.step + 1 == last) break;
      ++now.step;
    }
    wait(&room.results_empty[result], result_parity);
    if (raw)
      store_raw_state<S, kTiles>(state, room.results(p)[result], lane);
    else
      room.results(p)[result].store(state, lane);
    arrive(&room.results_full[result]);
    result += active;
    if (result >= p.folds) result -= p.folds, result_parity ^= 1;
    now.more = now.at.advance(p, active, cut.units);
    if (now.more) now.decode(p);
  }
}

template <class S, int kTiles>
__global__ void __launch_bounds__((kMaxWarps<kTiles> + 2) * 32, 1) attend_kernel(const __grid_constant__ AttendParameters p) {
  extern __shared__ __align__(128) uint8_t shared[];
  Room<S, kTiles>& room = *reinterpret_cast<Room<S, kTiles>*>(shared);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = static_cast<int>(threadIdx.x) % 32;
  const Cut cut = p.plan.cuts[blockIdx.x];
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; ++i) init_barrier(&room.keys[i], kCopyArrivals), init_barrier(&room.values[i], kCopyArrivals);
    for (int i = 0; i < p.folds; ++i) init_barrier(&room.results_full[i], 32), init_barrier(&room.results_empty[i], 32);
    for (int i = 0; i < p.query_slots; ++i) init_barrier(&room.queries_full[i], 32), init_barrier(&room.queries_empty[i], 32);
    publish_barriers();
  }
  if (threadIdx.x == 0) room.merges.count = 0;
  __syncthreads();
  // A tile that this step packs may be read by any request: only in a step that packs none are tiles read early.
  const bool early = p.plan.header->packs == 0;
  if (warp < p.warps) {
    compute<S, kTiles>(p, cut, room, warp, lane, early);
  } else if (warp == p.warps) {
    wait_for_previous();
    let_next_start();
    fold_share<S, kTiles>(p, cut, room.levels, room.results(p), room.results_full, room.results_empty,
                          room.queries_empty, room.merges, lane);
  } else {
    wait_for_previous();
    prepare_queries<S, kTiles>(p, cut, room.queries(), room.scales[0], room.queries_full, room.queries_empty, lane);
    clear_absent<S>(p, lane);
  }
  __syncthreads();
  for (int i = 0; i < room.merges.count; ++i) {
    auto* entries = reinterpret_cast<MergeEntry*>(room.slots(p));
    const MergeList::Segment segment = room.merges.segments[i];
    if (warp == 0) room.parts = list_parts<S, kTiles>(p, segment, entries, lane);
    __syncthreads();
    for (int slice = warp; slice < kTiles * S::head_dim / 16; slice += p.warps + 2)
      merge_slice<S, kTiles>(entries, room.parts, slice, room.levels[2], lane);
    __syncthreads();
    if (warp == 0)
      Folder<S, kTiles>{p, room.levels, lane}.finish(p.plan.blocks[segment.block], segment.head);
    __syncthreads();
  }
}

// Shared memory and warps of a CTA on this device.
template <class S, int kTiles>
cudaError_t configure(AttendParameters& p, int64_t& bytes) {
  using R = Room<S, kTiles>;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  p.query_slots = kTiles == 4 ? 2 : 4;
  p.folds = kTiles == 1 && S::head_dim <= 128 ? 16 : 8;
  const auto fixed = [&] { return R::slots_at(p.query_slots, p.folds); };
  while (p.folds > 2 && limit - fixed() < 4 * Walk<S>::kSlotBytes) p.folds /= 2;
  p.slots = static_cast<int32_t>(std::min<int64_t>(kMaxSlots, (limit - fixed()) / Walk<S>::kSlotBytes));
  if (p.slots < 1) return cudaErrorInvalidConfiguration;
  p.warps = std::min({p.slots, p.folds, kMaxWarps<kTiles>});  // no more warps than results, see compute()
  bytes = fixed() + p.slots * int64_t{Walk<S>::kSlotBytes};
  return cudaSuccess;
}

template <class S, int kTiles>
cudaError_t launch_attend(AttendParameters p, int32_t ctas, cudaStream_t stream) {
  int64_t bytes = 0;
  cudaError_t error = configure<S, kTiles>(p, bytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(attend_kernel<S, kTiles>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  return launch_dependent(attend_kernel<S, kTiles>, dim3(static_cast<unsigned>(ctas)),
                          dim3(static_cast<unsigned>(32 * (p.warps + 2))), static_cast<size_t>(bytes), stream, p);
}

// columns: of a block, 4, 8 or 16.
template <class S>
cudaError_t attend_shape(const AttendParameters& p, int32_t columns, int32_t ctas, cudaStream_t stream) {
  if (columns == 4) return launch_attend<S, 1>(p, ctas, stream);
  if (columns == 8) return launch_attend<S, 2>(p, ctas, stream);
  if constexpr (S::head_dim <= 128) return launch_attend<S, 4>(p, ctas, stream);
  return cudaErrorInvalidValue;
}

}  // namespace kvarn::cuda
