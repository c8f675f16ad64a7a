// SPDX-License-Identifier: Apache-2.0
// The tiles that a step completes, or left to pack: which they are, and their raw values into shared memory.
#pragma once

#include "cuda/append_pages.cuh"
#include "cuda/barrier.cuh"
#include "cuda/encode_lines.cuh"

namespace kvarn::cuda {

// One of the tiles that complete.
struct Completed {
  kvarn_cuda_layer layer;
  TilePlan tile;
  int older;  // tokens that lie raw already, or -1: there is no such tile
};

// The `index`-th tile that this step left to pack, its layer first.
template <class Shape>
__device__ inline Completed deferred(const AppendArguments& a, int index) {
  const int request = a.plan.deferred[index / a.layers],
            tile = a.plan.requests[request].length / Shape::page_tokens - 1;
  return {a.plan.layers[index % a.layers], {request, tile, 0, 0, -1}, Shape::page_tokens};
}

// The `index`-th tile to pack, for the whole CTA, in shared memory.
template <class Shape, int kThreads>
__device__ inline const Completed& find_completed(const AppendArguments& a, int tiles, int index) {
  constexpr int kWarps = kThreads / 32;
  __shared__ int warp_count[kWarps];
  __shared__ Completed found;
  __syncthreads();  // those of the call before were read
  if (threadIdx.x == 0) {
    found.older = -1;
    if (a.layers > 0) found = deferred<Shape>(a, index);
  }
  if (a.layers > 0) tiles = 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int first = 0, before = 0; first < tiles && before <= index; first += kThreads) {
    const int e = first + threadIdx.x;
    TilePlan tile{};
    RequestPlan request{};
    bool completes = false;
    if (e < tiles) {
      tile = a.plan.tiles[e];
      request = a.plan.requests[tile.request];
      const int end = (tile.tile + 1) * Shape::page_tokens;
      completes = request.length >= end + request.deferred;
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
      found = {a.layer, tile, position - tile.tile * Shape::page_tokens};
    }
    __syncthreads();
  }
  __syncthreads();
  return found;
}

// A chunk in the order of its places in shared memory (place_of).
__device__ inline uint4 placed(uint4 chunk) {
  return make_uint4(__byte_perm(chunk.x, chunk.z, 0x5410), __byte_perm(chunk.x, chunk.z, 0x7632),
                    __byte_perm(chunk.y, chunk.w, 0x5410), __byte_perm(chunk.y, chunk.w, 0x7632));
}

// Where the raw tokens of one side of a tile lie, n at a time: in the pages ahead, or in the workspace.
template <class Shape>
struct RawPieces {
  static constexpr int kTokens = Shape::raw_tokens_per_page, kPieces = Shape::pages_ahead;
  static_assert(kTokens * kPieces >= Shape::page_tokens);
  uint16_t* piece[kPieces];
  __device__ uint4* at(int offset) const {
    return reinterpret_cast<uint4*>(piece[offset / kTokens] + offset % kTokens * Shape::head_dim);
  }
};

// Brings a completed tile's raw values of one side into shared memory, and writes the new ones raw if `store`. All is
// asked for at once, the caller's rows of 16 bits too: what a thread asks for, it works on in its place.
template <class Shape, int kThreads, class Memory>
__device__ inline void gather(const AppendArguments& a, const Completed& c, int head, bool values, bool store,
                              Memory& memory) {
  constexpr int kStride = Shape::head_dim + kChunk, kChunks = Shape::head_dim / kChunk;
  constexpr int kLanes = kVectorLanes<Shape::head_dim>, kStep = kThreads / kLanes;
  __shared__ RawPieces<Shape> raw;
  const Places<Shape> places{a, c.layer.pages};
  const TilePlan& tile = c.tile;
  const Rows from = values ? a.v : a.k;
  const float* balance = values ? nullptr : a.balance;
  const int older = c.older, rows = min(tile.rows, Shape::page_tokens - older);
  const int lane = threadIdx.x % kLanes, mine = threadIdx.x / kLanes;  // of a row's chunks; the first of the rows
  const bool has = has_chunk<Shape::head_dim>(lane), direct = from.aligned && from.dtype != KVARN_FLOAT32;
  const auto kept = [&](int offset) { return reinterpret_cast<uint4*>(memory.values + offset * kStride); };
  const auto element = [&](int row) {
    return (int64_t{tile.first_row} + row) * from.token_stride + head * from.head_stride + kChunk * lane;
  };

  if (threadIdx.x < RawPieces<Shape>::kPieces) {
    const int offset = threadIdx.x * RawPieces<Shape>::kTokens;
    raw.piece[threadIdx.x] = tile.raw < 0 ? places.in_pages(tile.request, tile.tile, offset, head, values)
                                          : places.in_workspace(tile.raw, offset, head, values);
  }
  if (direct && has) {
    const uint16_t* source = static_cast<const uint16_t*>(from.data) + element(mine);
#pragma unroll 1
    for (int row = mine; row < rows; row += kStep, source += kStep * from.token_stride)
      copy_chunk(kept(older + row) + lane, source);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < older * kChunks; i += kThreads)
    copy_chunk(kept(i / kChunks) + i % kChunks, raw.at(i / kChunks) + i % kChunks);
  wait_for_chunks();

#pragma unroll 1
  for (int i = threadIdx.x; i < older * kChunks; i += kThreads) {
    uint4& chunk = kept(i / kChunks)[i % kChunks];
    chunk = placed(chunk);
  }
  int replaced = 0;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * (32 / kLanes); first < rows; first += kStep) {  // of the warp's
    const int row = first + mine % (32 / kLanes), offset = older + row;
    const bool valid = row < rows && has;
    uint4* const keep = kept(offset) + lane;
    float x[kChunk] = {};
    if (valid) {
      if (direct)
        widen_chunk(*keep, from.dtype, x);
      else
        load_chunk(from, element(row), x);
      if (balance != nullptr) divide<Shape::head_dim>(x, balance, head, lane);
    }
    const uint4 chunk = rotate_raw<Shape::head_dim>(x, lane, replaced);
    if (valid) *keep = placed(chunk);
    if (valid && store) raw.at(offset)[lane] = chunk;
  }
  if (store) count_replaced(a, replaced);
}

}  // namespace kvarn::cuda
