// SPDX-License-Identifier: Apache-2.0
// What append's kernels get, and where a step's raw tokens and records lie.
//
// One kernel writes raw tokens and packs, its CTAs in any order, because no two of them touch the same bytes except to
// read. Let tile j of a request complete in this step, L be its length after the step, n and m as in specification
// section 3.
// - If L - (j+1) G > n, tile j has a raw tile in the workspace: the kernel before copied its older tokens there,
//   and the CTA that packs it writes its new ones there. It reads nothing of the pages and writes page j.
// - If j is deferred, L = (j+1) G and nobody else of the step has page j: its new tokens are written raw as those of a
//   tail, page j is not touched, and pack, after all attention of the step, reads pages j+1 .. j+m and writes page j.
// - Otherwise j is the last tile that completes. Its raw tokens lie in pages j+1 .. j+m; its CTA reads the older ones,
//   writes the new ones, and writes page j. The tail, tile j+1, has at most n tokens, all in page j+1+m: a draft that
//   straddles the edge is disjoint from the tile that it completes.
// - A tail of more than n tokens, tile i, writes pages i+1 .. i+m. No record goes there, since no tile behind i has
//   tokens, and no raw token of a tile before i is read there, since all of those that complete are in the workspace.
// - Page j, where the record goes, is raw room of the tiles j-m .. j-1. Of these, one that has rows in this step
//   completes with L - (its end) >= G > n: it is read from the workspace. One without rows is packed since an earlier
//   step.
// Requests share only pages that are packed, and those are behind every `start`; heads have regions of their own; K and
// V of a region are different bytes, raw and packed, and raw and packed never meet by the above.
#pragma once

#include "cuda/launch.hpp"
#include "cuda/rotate.cuh"
#include "cuda/shape.hpp"

namespace kvarn::cuda {

struct AppendArguments {
  Plan plan;
  kvarn_cuda_layer layer;  // of append; pack has those of plan.layers
  int32_t layers;          // 0: append; else pack of so many
  const int32_t* block_table;
  int64_t table_stride;
  int32_t requests, kv_heads;
  Rows k, v;
  const float* balance;  // null, or [head][channel], powers of two
  unsigned long long* replaced;
  int32_t tail_vectors;  // of a request, at most
};

template <class Shape>
struct Places {
  const AppendArguments& a;
  const kvarn_pages& pages;

  // The region of (request, entry of its table row, head).
  __device__ uint8_t* region(int request, int index, int head) const {
    int64_t page = a.block_table[request * a.table_stride + index];
    page = page < 0 ? 0 : page < pages.count ? page : pages.count - 1;
    return pages.data + page * pages.stride + int64_t{head} * Shape::record_bytes;
  }
  // A raw vector in the pages.
  __device__ uint16_t* in_pages(int request, int tile, int offset, int head, bool values) const {
    constexpr int kN = Shape::raw_tokens_per_page;
    const int index = tile + (offset < kN ? Shape::pages_ahead : offset / kN), slot = offset % kN;
    return reinterpret_cast<uint16_t*>(region(request, index, head)) + (values ? kN + slot : slot) * Shape::head_dim;
  }
  // A raw vector in raw tile `raw` of the workspace.
  __device__ uint16_t* in_workspace(int raw, int offset, int head, bool values) const {
    const int64_t array = (int64_t{raw} * a.kv_heads + head) * 2 + values;
    return a.plan.raw + (array * Shape::page_tokens + offset) * Shape::head_dim;
  }
};

// Divides a lane's chunk of a key by its part of the balance, exactly: the inverse of a power of two is one.
template <int kHeadDim>
__device__ inline void divide(float (&x)[kChunk], const float* balance, int head, int lane) {
  const float4* from = reinterpret_cast<const float4*>(balance + head * kHeadDim + kChunk * lane);
  const float4 a = __ldg(from), b = __ldg(from + 1);
  const float by[kChunk] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = __fmul_rn(x[i], __frcp_rn(by[i]));
}

// Rotates a vector of the caller, in the lanes' chunks, to what is written raw. All 32 lanes of the warp take part,
// those without a chunk with zeros. Counts the elements that it replaces.
template <int kHeadDim>
__device__ inline uint4 rotate_raw(float (&x)[kChunk], int lane, int& replaced) {
  const bool tame = __all_sync(0xffffffffu, magnitude(x) <= kTame);
  if (!tame) replaced += sanitize(x);
  rotate<kHeadDim>(x, lane);
  return raw_chunk(x, !tame);
}

__device__ inline void count_replaced(const AppendArguments& a, int replaced) {
  if (replaced > 0 && a.replaced != nullptr) atomicAdd(a.replaced, static_cast<unsigned long long>(replaced));
}

}  // namespace kvarn::cuda
