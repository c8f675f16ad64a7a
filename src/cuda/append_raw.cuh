// SPDX-License-Identifier: Apache-2.0
// The raw half of append: staging, and the rows of tiles that stay unfinished.
#pragma once

#include "cuda/append_pages.cuh"

namespace kvarn::cuda {

// Copies the older raw tokens of a request's first tile to the workspace, since this step overwrites their place.
// Grid (requests, KV heads).
template <class Shape>
__global__ __launch_bounds__(256) void stage_kernel(const __grid_constant__ AppendArguments a) {
  wait_for_previous();
  let_next_start();
  const Places<Shape> places{a, a.layer.pages};
  const int request = blockIdx.x, head = blockIdx.y;
  const RequestPlan is = a.plan.requests[request];
  const int older = (is.length - is.queries) % Shape::page_tokens;
  if (is.length == 0 || is.queries == 0 || older == 0) return;
  const TilePlan tile = a.plan.tiles[is.first_tile];
  if (tile.raw < 0) return;
  constexpr int kChunks = Shape::head_dim / kChunk;
  for (int i = threadIdx.x; i < 2 * older * kChunks; i += blockDim.x) {
    const int vector = i / kChunks, chunk = i % kChunks, offset = vector >> 1;
    const bool values = vector & 1;
    const uint16_t* from = places.in_pages(request, tile.tile, offset, head, values);
    uint16_t* to = places.in_workspace(tile.raw, offset, head, values);
    reinterpret_cast<uint4*>(to)[chunk] = reinterpret_cast<const uint4*>(from)[chunk];
  }
}

// The step's rows in the tiles that requests leave unfinished or unpacked, a few vectors a warp, over all warps of the
// grid.
template <class Shape, int kThreads>
__device__ inline void write_tails(const AppendArguments& a) {
  constexpr int kLanes = kVectorLanes<Shape::head_dim>, kVectors = 32 / kLanes, kWarps = kThreads / 32;
  const Places<Shape> places{a, a.layer.pages};
  const int sub = threadIdx.x % 32 / kLanes, lane = threadIdx.x % kLanes;
  const int64_t vectors = int64_t{a.requests} * a.tail_vectors;
  // Neighbouring vectors in different CTAs: in a decode step every multiprocessor has a warp or two to do.
  int64_t first = (int64_t{threadIdx.x / 32} * gridDim.x + blockIdx.x) * kVectors;
  for (; first < vectors; first += int64_t{kWarps} * gridDim.x * kVectors) {
    const int request = static_cast<int>((first + sub) / a.tail_vectors);
    const int vector = static_cast<int>((first + sub) % a.tail_vectors);
    const RequestPlan is = request < a.requests ? a.plan.requests[request] : RequestPlan{};
    const int tail = is.deferred != 0 ? Shape::page_tokens : is.length % Shape::page_tokens;
    const int rows = is.queries < tail ? is.queries : tail;
    const int row = vector / (2 * a.kv_heads), head = vector % a.kv_heads;
    const bool values = vector / a.kv_heads % 2, valid = row < rows;
    if (!__any_sync(0xffffffffu, valid)) continue;
    const int back = rows - row;  // counted from the end of the request
    uint16_t* to =
        valid ? places.in_pages(request, (is.length - tail) / Shape::page_tokens, tail - back, head, values) : nullptr;
    const Rows& from = values ? a.v : a.k;
    const int64_t token = int64_t{is.first_row} + is.queries - back;
    const bool mine = valid && has_chunk<Shape::head_dim>(lane);
    float x[kChunk] = {};
    int replaced = 0;
    if (mine) load_chunk(from, token * from.token_stride + head * from.head_stride + kChunk * lane, x);
    if (mine && !values && a.balance != nullptr) divide<Shape::head_dim>(x, a.balance, head, lane);
    const uint4 chunk = rotate_raw<Shape::head_dim>(x, lane, replaced);
    if (mine) reinterpret_cast<uint4*>(to)[lane] = chunk;
    count_replaced(a, replaced);
  }
}

}  // namespace kvarn::cuda
