// SPDX-License-Identifier: Apache-2.0
// append (specification section 8) on the device, in at most two launches: stage, if any request can have to; then
// rotate, write raw and pack. And pack, the same kernel: what append of many layers left to it.
#pragma once

#include <type_traits>

#include "cuda/append.hpp"
#include "cuda/append_completed.cuh"
#include "cuda/append_raw.cuh"
#include "cuda/encode_pack.cuh"
#include "cuda/varnorm.cuh"
#include "cuda/weighted.cuh"

namespace kvarn::cuda {

// Threads of a CTA: one CTA per multiprocessor for the shortest time from the last token of a tile to its record, two
// for the most tiles a second, since then one computes while the other waits.
inline constexpr int kFastThreads = 512, kManyThreads = 256;

inline constexpr int kHalvedPairs = 4;

// What a CTA packs of a pair (completed tile, head).
enum class Half { kKeys, kValues, kBoth };

template <class Shape, int kThreads, kvarn_encoder kEncoder, bool kValues, class Memory>
__device__ inline void encode(Memory& memory, const float* feedback, uint8_t* record) {
  using Is = EncodeShape<kThreads, kValues ? Side::kValues : Side::kKeys, Shape::page_tokens, Shape::head_dim,
                         kValues ? Shape::v_bits : Shape::k_bits>;
  if constexpr (kEncoder == KVARN_WEIGHTED)
    Weighted<Is, Memory>{memory}.encode(feedback);
  else
    Varnorm<Is, Memory>{memory}.encode();
  __syncthreads();
  write_record<Shape, Is>(memory, kEncoder == KVARN_WEIGHTED ? 1 / kLift : 1, record);
}

// V first: its norms are in the weights of K's tokens. One loop, so that what brings the values is there once.
template <class Shape, int kThreads, kvarn_encoder kEncoder, class Memory>
__device__ inline void pack(const AppendArguments& a, const Completed& c, int head, Half half, Memory& memory) {
  constexpr bool kWeighted = kEncoder == KVARN_WEIGHTED;
  uint8_t* record = Places<Shape>{a, c.layer.pages}.region(c.tile.request, c.tile.tile, head);
  const float* feedback = c.layer.feedback;
  if (feedback != nullptr) feedback += head * (Shape::head_dim * Shape::head_dim);
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const bool values = side == 0, wanted = half != (values ? Half::kKeys : Half::kValues);
    if (!wanted && !(values && kWeighted)) continue;
    gather<Shape, kThreads>(a, c, head, values, wanted, memory);
    __syncthreads();
    if constexpr (kWeighted) {
      token_norms<kThreads, Shape::page_tokens, Shape::head_dim>(memory.values, values ? memory.v_norm : memory.k_norm);
      __syncthreads();
    }
    if (!wanted) continue;
    if (values)
      encode<Shape, kThreads, kEncoder, true>(memory, nullptr, record);
    else
      encode<Shape, kThreads, kEncoder, false>(memory, feedback, record);
    __syncthreads();
  }
}

// Every CTA writes its share of the tails, then packs pairs (completed tile, head): both halves where there is a pair
// for every CTA, so that V is read and rotated once; else K and V in different CTAs, K first, which takes longer. pack,
// whose CTAs all have several pairs, does so up to kHalvedPairs of them, to end evenly.
template <class Shape, int kThreads, kvarn_encoder kEncoder>
__global__ __launch_bounds__(kThreads,
                             kFastThreads / kThreads) void append_kernel(const __grid_constant__ AppendArguments a) {
  using Memory = EncodeMemory<Shape::page_tokens, Shape::head_dim>;
  extern __shared__ __align__(16) uint8_t shared[];
  Memory& memory = *reinterpret_cast<Memory*>(shared);
  wait_for_previous();
  let_next_start();
  const PlanHeader header = *a.plan.header;
  write_tails<Shape, kThreads>(a);
  const int64_t pairs = (a.layers > 0 ? int64_t{header.deferred} * a.layers : header.packs) * a.kv_heads;
  const bool both = pairs >= int64_t{a.layers > 0 ? kHalvedPairs : 1} * gridDim.x;
  for (int64_t item = blockIdx.x; item < (both ? 1 : 2) * pairs; item += gridDim.x) {
    const int pair = static_cast<int>(item < pairs ? item : item - pairs), head = pair % a.kv_heads;
    const Completed& c = find_completed<Shape, kThreads>(a, header.tiles, pair / a.kv_heads);
    if (c.older < 0) return;
    const Half half = both ? Half::kBoth : item < pairs ? Half::kKeys : Half::kValues;
    pack<Shape, kThreads, kEncoder>(a, c, head, half, memory);
  }
}

template <class Shape, int kThreads, kvarn_encoder kEncoder>
cudaError_t launch_append(const AppendArguments& a, int64_t completed, cudaStream_t stream) {
  using Memory = EncodeMemory<Shape::page_tokens, Shape::head_dim>;
  constexpr auto kKernel = append_kernel<Shape, kThreads, kEncoder>;
  constexpr int kVectors = 32 / kVectorLanes<Shape::head_dim>;
  static_assert(least_bytes<Memory>() <= kLeastShared);
  Gpu gpu;
  if (const cudaError_t error = current_gpu(gpu); error != cudaSuccess) return error;
  const int bytes = sizeof(Memory) <= static_cast<size_t>(gpu.shared_bytes) ? sizeof(Memory) : least_bytes<Memory>();
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  // A CTA leaves no room for one of attention's beside it: where hardly a tile completes, tails get few, all warps of
  // which have work, and attention begins on the other multiprocessors.
  const int64_t warps = (int64_t{a.requests} * a.tail_vectors + kVectors - 1) / kVectors;
  const int64_t tails = completed > 0 ? warps : (warps + kThreads / 32 - 1) / (kThreads / 32);
  const int64_t ctas =
      std::min(std::max(2 * completed * a.kv_heads, tails), int64_t{gpu.multiprocessors} * (kFastThreads / kThreads));
  return launch_dependent(kKernel, dim3(static_cast<uint32_t>(ctas)), dim3(kThreads), static_cast<size_t>(bytes),
                          stream, a);
}

// body(encoder) with the encoder as a type.
template <class Body>
cudaError_t with_encoder(kvarn_encoder encoder, const Body& body) {
  return encoder == KVARN_VARNORM ? body(std::integral_constant<kvarn_encoder, KVARN_VARNORM>{})
                                  : body(std::integral_constant<kvarn_encoder, KVARN_WEIGHTED>{});
}

template <class Shape>
cudaError_t append_shape(const Launch& launch, const kvarn_rows& k, const kvarn_rows& v, kvarn_encoder encoder,
                         const float* feedback, const float* balance, int64_t* replaced) {
  const kvarn_cuda_step& step = launch.step;
  const int32_t heads = launch.layout.kv_heads, requests = step.batch.requests;
  if (requests == 0 || step.tokens == 0 || step.max_query_len == 0) return cudaSuccess;
  const AppendArguments a{launch.plan(),
                          {launch.pages, feedback},
                          0,
                          step.batch.block_table,
                          step.batch.table_stride,
                          requests,
                          heads,
                          make_rows(k),
                          make_rows(v),
                          balance,
                          reinterpret_cast<unsigned long long*>(replaced),
                          2 * heads * std::min(step.max_query_len, Shape::page_tokens)};
  // A request can have to stage only if n + 1 rows lie behind the edge of a tile that it was in.
  const bool prompt = step.max_query_len >= Shape::raw_tokens_per_page + 2;
  if (prompt) {
    const cudaError_t error =
        launch_dependent(stage_kernel<Shape>, dim3(static_cast<uint32_t>(requests), static_cast<uint32_t>(heads)),
                         dim3(256), 0, launch.stream, a);
    if (error != cudaSuccess) return error;
  }
  // Of single rows that defer only tiles in shared pages are left, which hardly ever happens.
  const int64_t completed = step.max_query_len > 1 ? most_tiles(launch.layout, step.tokens, requests)
                            : step.defer != 0      ? 0
                                                   : requests;
  return with_encoder(encoder, [&](auto is) {
    const auto run =
        prompt ? launch_append<Shape, kManyThreads, is.value> : launch_append<Shape, kFastThreads, is.value>;
    return run(a, completed, launch.stream);
  });
}

// plan.layers has its layers.
template <class Shape>
cudaError_t pack_shape(const Launch& launch, int32_t layers, kvarn_encoder encoder) {
  const kvarn_batch& batch = launch.step.batch;
  AppendArguments a{};
  a.plan = launch.plan();
  a.layers = layers;
  a.block_table = batch.block_table;
  a.table_stride = batch.table_stride;
  a.kv_heads = launch.layout.kv_heads;
  return with_encoder(encoder, [&](auto is) {
    return launch_append<Shape, kFastThreads, is.value>(a, int64_t{batch.requests} * layers, launch.stream);
  });
}

}  // namespace kvarn::cuda
