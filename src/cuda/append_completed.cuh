// SPDX-License-Identifier: Apache-2.0
// The tiles that a step completes: which they are, and their raw values into shared memory.
#pragma once

#include "cuda/append_pages.cuh"

namespace kvarn::cuda {

// One of the tiles that complete.
struct Completed {
  TilePlan tile;
  int older;  // tokens from before this step
};

// The `index`-th tile that completes, for the whole CTA; tile.rows is 0 if there are fewer.
template <class Shape, int kThreads>
__device__ inline Completed find_completed(const AppendArguments& a, int tiles, int index) {
  constexpr int kWarps = kThreads / 32;
  __shared__ int warp_count[kWarps];
  __shared__ Completed found;
  __syncthreads();  // those of the call before were read
  if (threadIdx.x == 0) found.tile.rows = 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int first = 0, before = 0; first < tiles && before <= index; first += kThreads) {
    const int e = first + threadIdx.x;
    TilePlan tile{};
    RequestPlan request{};
    bool completes = false;
    if (e < tiles) {
      tile = a.plan.tiles[e];
      request = a.plan.requests[tile.request];
      completes = request.length >= (tile.tile + 1) * Shape::page_tokens;
    }
    const uint32_t ballot = __ballot_sync(0xffffffffu, completes);
    if (lane == 0) warp_count[warp] = __popc(ballot);
    __syncthreads();
    int rank = before + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      rank += w < warp ? warp_count[w] : 0;
      before += warp_count[w];
    }
    if (completes && rank == index) {
      const int position = request.length - request.queries + tile.first_row - request.first_row;
      found = {tile, position - tile.tile * Shape::page_tokens};
    }
    __syncthreads();
  }
  __syncthreads();
  return found;
}

// Brings a completed tile's raw values of one side into shared memory, and writes the new ones raw if `store`.
template <class Shape, int kThreads, class Memory>
__device__ inline void gather(const AppendArguments& a, const Completed& c, int head, bool values, bool store,
                              Memory& memory) {
  constexpr int kStride = Shape::head_dim + kChunk, kChunks = Shape::head_dim / kChunk;
  const Places<Shape> places{a};
  const TilePlan& tile = c.tile;
  const auto place = [&](int offset) {
    return tile.raw < 0 ? places.in_pages(tile.request, tile.tile, offset, head, values)
                        : places.in_workspace(tile.raw, offset, head, values);
  };
#pragma unroll 4
  for (int i = threadIdx.x; i < c.older * kChunks; i += kThreads) {
    const int offset = i / kChunks, chunk = i % kChunks;
    reinterpret_cast<uint4*>(memory.values + offset * kStride)[chunk] =
        reinterpret_cast<const uint4*>(place(offset))[chunk];
  }
  constexpr int kLanes = kVectorLanes<Shape::head_dim>, kVectors = 32 / kLanes;
  const int sub = threadIdx.x % 32 / kLanes, lane = threadIdx.x % kLanes;
  int replaced = 0;
#pragma unroll 2
  for (int first = threadIdx.x / 32 * kVectors; first < tile.rows; first += kThreads / kLanes) {
    const int row = first + sub, offset = c.older + row;
    const bool valid = row < tile.rows && offset < Shape::page_tokens;
    replaced += rotate_raw<Shape::head_dim>(values ? a.v : a.k, int64_t{tile.first_row} + row, head, lane, valid,
                                            valid && store ? place(offset) : nullptr,
                                            valid ? memory.values + offset * kStride : nullptr);
  }
  if (store) count_replaced(a, replaced);
}

}  // namespace kvarn::cuda
