// SPDX-License-Identifier: Apache-2.0
// The pages and tables with which a paged 16-bit attention kernel computes a prompt: every query tile is a sequence,
// its keys the expanded tiles before it and its own tile raw.
//
// One launch. A request that takes part owns a run of pages: its tiles before the last query tile, expanded, then one
// page per query tile, raw. Each CTA sums the runs up for itself, so that no table of work goes through memory.
#pragma once

#include "cuda/expand_kernel.cuh"

namespace kvarn::cuda {

// A request of the step as sequences and pages.
template <int PageTokens>
struct PromptTiles {
  int32_t first_row, rows;
  int32_t start;        // position of its first row
  int32_t first, last;  // query tiles; last < first: rows that belong to nobody
  int32_t sequences;

  __device__ PromptTiles(const PrefillArguments& in, int32_t r) {
    const RequestPlan request = in.plan.requests[r];
    if (request.queries > 0) {
      first_row = request.first_row, rows = request.queries, start = request.length - rows;
      first = start / PageTokens, last = (request.length - 1) / PageTokens;
      sequences = last - first + 1;
    } else {  // its rows become sequences without keys, so that the query ranges stay adjacent
      first_row = min(max(in.batch.query_starts[r], 0), in.tokens);
      rows = max(min(in.batch.query_starts[r + 1], in.tokens) - first_row, 0);
      start = 0, first = 0, last = -1;
      sequences = (rows + PageTokens - 1) / PageTokens;
    }
  }
  __device__ bool takes_part() const { return last >= first; }
  __device__ int32_t pages() const { return takes_part() ? last + sequences : 0; }
};

template <class Shape, class Lookups>
__device__ void write_tables(const PrefillArguments& in, const Lookups& pages, const Lookups& sequences) {
  constexpr int kG = Shape::page_tokens;
  using Prompt = PromptTiles<kG>;
  const kvarn_cuda_prefill& out = in.prefill;
  const auto sequences_of = [&](int32_t r) { return Prompt(in, r).sequences; };
  const int64_t total = min(sequences.total(), int64_t{out.sequences});
  int hint = 0;
  for (int64_t e = blockIdx.x; e <= out.sequences; e += gridDim.x) {
    int32_t length = 0, row = min(max(in.batch.query_starts[out.end_request], 0), in.tokens);
    if (e < total) {
      const Place place = sequences.find(e, hint, sequences_of);
      const Prompt prompt(in, place.request);
      const auto index = static_cast<int32_t>(place.index);
      row = prompt.first_row + index * kG;
      if (prompt.takes_part()) {
        const int32_t tile = prompt.first + index;
        const int64_t base = pages.before_request(place.request, [&](int32_t r) { return Prompt(in, r).pages(); });
        const int64_t own = base + prompt.last + index;
        row = prompt.first_row + max(prompt.start, tile * kG) - prompt.start;
        if (own < out.pages && tile < out.table_width) length = min(prompt.start + prompt.rows, (tile + 1) * kG);
        int32_t* entries = out.block_table + e * out.table_width;
        for (int32_t i = static_cast<int32_t>(threadIdx.x); i <= min(tile, out.table_width - 1);
             i += ExpandGrid<Shape>::threads)
          entries[i] = static_cast<int32_t>(min(i == tile ? own : base + i, int64_t{max(out.pages - 1, 0)}));
      }
    }
    if (threadIdx.x == 0) {
      out.query_starts[e] = row;
      if (e < out.sequences) out.seq_lens[e] = length;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *out.overflow = static_cast<int32_t>(max(pages.total() - out.pages, int64_t{0}));
}

template <class Shape, class Store>
__global__ void __launch_bounds__(ExpandGrid<Shape>::threads, ExpandGrid<Shape>::ctas_per_sm)
    prefill_kernel(const __grid_constant__ PrefillArguments in) {
  constexpr int kG = Shape::page_tokens, kD = Shape::head_dim;
  using Prompt = PromptTiles<kG>;
  __shared__ Lookup<ExpandGrid<Shape>::threads> pages, sequences;
  wait_for_previous();
  let_next_start();
  const auto pages_of = [&](int32_t r) { return Prompt(in, r).pages(); };
  pages.build(in.prefill.first_request, in.prefill.end_request, pages_of);
  sequences.build(in.prefill.first_request, in.prefill.end_request, [&](int32_t r) { return Prompt(in, r).sequences; });
  write_tables<Shape>(in, pages, sequences);

  const int64_t count = min(pages.total(), int64_t{in.prefill.pages});
  int hint = 0;
  for (Walk at(head_groups<Shape>(in.heads)); at.page < count; at.advance()) {
    const Place place = pages.find(at.page, hint, pages_of);
    const int32_t head = at.group * ExpandGrid<Shape>::heads + Lane<Shape>().head;
    if (head >= in.heads) continue;
    const Prompt prompt(in, place.request);
    const int32_t* table = in.batch.block_table + place.request * in.batch.table_stride;
    const int64_t token = at.page * kG, region = head * Shape::layout.record_bytes;
    const auto index = static_cast<int32_t>(place.index);
    if (index < prompt.last) {
      const uint8_t* record = page_at(in.pages, table[index]) + region;
      expand_k<Shape, Store>(record, in.k, token, head);
      expand_v<Shape, Store>(record, in.v, token, head);
      continue;
    }
    const int32_t tile = prompt.first + index - prompt.last;
    const int32_t visible = min(prompt.start + prompt.rows - tile * kG, kG);
    const int32_t raw = in.plan.tiles[in.plan.requests[place.request].first_tile + tile - prompt.first].raw;
    if (raw >= 0) {
      const auto* tokens =
          reinterpret_cast<const uint8_t*>(in.plan.raw + (int64_t{raw} * in.heads + head) * 2 * kG * kD);
      expand_raw<Shape, Store>([&](int o) { return tokens + o * 2 * kD; }, int64_t{2} * kG * kD, visible, in.k, in.v,
                               token, head);
    } else {
      const auto k_of = [&](int o) {
        constexpr kvarn_layout layout = Shape::layout;
        const format::RawPlace from = format::raw_place(layout, tile * kG + o);
        return page_at(in.pages, table[from.page]) + region + 2 * format::raw_k_offset(layout, from.slot);
      };
      expand_raw<Shape, Store>(k_of, int64_t{2} * Shape::raw_tokens_per_page * kD, visible, in.k, in.v, token, head);
    }
  }
}

template <class Shape>
cudaError_t prefill_shape(const PrefillArguments& arguments, cudaStream_t stream) {
  const int64_t items = max(int64_t{arguments.prefill.pages} * head_groups<Shape>(arguments.heads),
                            int64_t{arguments.prefill.sequences} + 1);
  unsigned ctas = 0;
  if (const cudaError_t error = expand_ctas<Shape>(items, &ctas)) return error;
  const bool halves = arguments.k.half_vectors() && arguments.v.half_vectors();
  return launch_dependent(halves ? prefill_kernel<Shape, Halves> : prefill_kernel<Shape, Elements>, dim3(ctas),
                          dim3(ExpandGrid<Shape>::threads), 0, stream, arguments);
}

}  // namespace kvarn::cuda
