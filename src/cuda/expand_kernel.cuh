// SPDX-License-Identifier: Apache-2.0
// expand (specification section 10): a persistent grid over (tile, KV head).
#pragma once

#include "cuda/expand_lookup.cuh"
#include "cuda/expand_tile.cuh"

namespace kvarn::cuda {

// CTAs of a persistent grid over `items`.
template <class Shape>
cudaError_t expand_ctas(int64_t items, unsigned* ctas) {
  Gpu gpu;
  if (const cudaError_t error = current_gpu(gpu)) return error;
  *ctas = static_cast<unsigned>(min(items, int64_t{gpu.multiprocessors} * ExpandGrid<Shape>::ctas_per_sm));
  return cudaSuccess;
}

template <class Shape>
constexpr int32_t head_groups(int32_t heads) {
  return (heads + ExpandGrid<Shape>::heads - 1) / ExpandGrid<Shape>::heads;
}

// The CTA's way through tiles (or pages) x groups of heads: items blockIdx.x, + gridDim.x, .. with adjacent CTAs on
// adjacent heads, so that what is written at one time lies together.
struct Walk {
  int64_t page;
  int32_t group, groups, pages_on, groups_on;

  __device__ explicit Walk(int32_t head_groups)
      : page(blockIdx.x / static_cast<unsigned>(head_groups)),
        group(static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(head_groups))),
        groups(head_groups),
        pages_on(static_cast<int32_t>(gridDim.x / static_cast<unsigned>(head_groups))),
        groups_on(static_cast<int32_t>(gridDim.x % static_cast<unsigned>(head_groups))) {}
  __device__ void advance() {
    page += pages_on;
    group += groups_on;
    if (group >= groups) group -= groups, ++page;
  }
};

template <class Shape, class Store>
__global__ void __launch_bounds__(ExpandGrid<Shape>::threads, ExpandGrid<Shape>::ctas_per_sm)
    expand_kernel(const __grid_constant__ ExpandArguments in) {
  using Grid = ExpandGrid<Shape>;
  __shared__ Lookup<Grid::threads> lookup;
  wait_for_previous();
  let_next_start();
  const auto tiles_of = [&](int32_t r) { return max(in.batch.seq_lens[r], 0) / Shape::page_tokens; };
  lookup.build(0, in.batch.requests, tiles_of);
  const int64_t tiles = min(lookup.total(), in.tiles);

  int hint = 0;
  const auto page_index = [&](int64_t tile) {
    if (tile >= tiles) return 0;
    const Place place = lookup.find(tile, hint, tiles_of);
    const int64_t column = min(place.index, int64_t{in.batch.table_width - 1});
    return in.batch.block_table[place.request * in.batch.table_stride + column];
  };
  const int thread_head = Lane<Shape>().head;
  const auto record_of = [&](int32_t index, const Walk& at) {
    return page_at(in.pages, index) + (at.group * Grid::heads + thread_head) * Shape::layout.record_bytes;
  };

  // An item's page is asked for two items ahead, so that nobody waits for the block table.
  Walk at(head_groups<Shape>(in.heads)), ahead = at;
  ahead.advance();
  const uint8_t* record = record_of(page_index(at.page), at);
  int32_t index_ahead = page_index(ahead.page);
  while (at.page < tiles) {
    Walk later = ahead;
    later.advance();
    const uint8_t* record_ahead = record_of(index_ahead, ahead);
    index_ahead = page_index(later.page);
    const int32_t head = at.group * Grid::heads + thread_head;
    if (head < in.heads) {
      expand_k<Shape, Store>(record, in.k, at.page * Shape::page_tokens, head);
      expand_v<Shape, Store>(record, in.v, at.page * Shape::page_tokens, head);
    }
    record = record_ahead, at = ahead, ahead = later;
  }
}

template <class Shape>
cudaError_t expand_shape(const ExpandArguments& arguments, cudaStream_t stream) {
  if (arguments.batch.requests == 0 || arguments.batch.table_width == 0) return cudaSuccess;
  unsigned ctas = 0;
  if (const cudaError_t error = expand_ctas<Shape>(arguments.tiles * head_groups<Shape>(arguments.heads), &ctas))
    return error;
  if (ctas == 0) return cudaSuccess;
  const bool halves = arguments.k.half_vectors() && arguments.v.half_vectors();
  return launch_dependent(halves ? expand_kernel<Shape, Halves> : expand_kernel<Shape, Elements>, dim3(ctas),
                          dim3(ExpandGrid<Shape>::threads), 0, stream, arguments);
}

}  // namespace kvarn::cuda
