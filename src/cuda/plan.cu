// SPDX-License-Identifier: Apache-2.0
// The plan of a step, made by one CTA: scans over requests, then over query tiles, blocks and cuts.
#include <cub/block/block_scan.cuh>

#include "cuda/device.cuh"
#include "cuda/launch.hpp"

namespace kvarn::cuda {
namespace {

constexpr int kThreads = 1024;

struct Counts {
  int32_t tiles, raw, blocks;
  __device__ friend Counts operator+(const Counts& a, const Counts& b) {
    return {a.tiles + b.tiles, a.raw + b.raw, a.blocks + b.blocks};
  }
};
struct Costs {
  int64_t bytes;
  int32_t units;
  __device__ friend Costs operator+(const Costs& a, const Costs& b) { return {a.bytes + b.bytes, a.units + b.units}; }
};

struct Inputs {
  kvarn_layout layout;
  kvarn_batch batch;
  const int64_t* slots;
  int32_t tokens, max_seq_len, group, columns, window, ctas;
  int32_t max_tiles, max_raw_tiles, max_blocks;
};

// The last index i in 0 .. count-1 with key(i) <= value; key(0) <= value.
template <class Key, class Value>
__device__ int32_t last_at_most(int32_t count, Value value, Key key) {
  int32_t low = 0;
  for (int32_t high = count; high - low > 1;) {
    const int32_t middle = (low + high) / 2;
    (key(middle) <= value ? low : high) = middle;
  }
  return low;
}

// What the host could not check is checked here: a request that makes no sense takes no part.
__device__ RequestPlan request_of(const Inputs& in, int32_t r) {
  const int32_t length = in.batch.seq_lens[r], first = in.batch.query_starts[r], end = in.batch.query_starts[r + 1];
  const bool valid = length > 0 && length <= in.max_seq_len && first >= 0 && end > first && end <= in.tokens &&
                     end - first <= length && format::pages_of(in.layout, length) <= in.batch.table_width &&
                     (in.slots == nullptr || in.slots[first] >= 0);
  return valid ? RequestPlan{length, end - first, first, 0, 0, 0} : RequestPlan{};
}

// Query tiles of a request whose raw tokens have left the pages: its lowest ones.
__device__ int32_t raw_tiles(const Inputs& in, const RequestPlan& r, int32_t first_tile, int32_t tiles) {
  int32_t count = 0;
  // raw_in_pages(tile): length - (tile + 1) G <= n, so the first one inside is ceil((length - n) / G) - 1
  const int32_t beyond = r.length - in.layout.raw_tokens_per_page;
  if (beyond > 0) count = (beyond + in.layout.page_tokens - 1) / in.layout.page_tokens - 1 - first_tile;
  return min(max(count, 0), tiles);
}

__device__ int32_t tiles_of(const Inputs& in, const RequestPlan& r) {
  return r.queries == 0 ? 0
                        : (r.length - 1) / in.layout.page_tokens - (r.length - r.queries) / in.layout.page_tokens + 1;
}

__device__ int32_t pieces(int32_t tokens) { return (tokens + kRawTokens - 1) / kRawTokens; }
__device__ int32_t own_tokens(const Inputs& in, const BlockPlan& b, int which) {
  if (which + 1 < b.own_tiles) return in.layout.page_tokens;
  return (b.start + (b.first_column + b.columns - 1) / in.group) % in.layout.page_tokens + 1;
}
__device__ int64_t packed_bytes(const Inputs& in, const BlockPlan& b) {
  return max(b.end_tile - b.first_tile, 0) * in.layout.record_bytes;
}
__device__ int64_t block_bytes(const Inputs& in, const BlockPlan& b) {
  int64_t tokens = 0;
  for (int i = 0; i < b.own_tiles; ++i) tokens += (own_tokens(in, b, i) + 15) / 16 * 16;
  return packed_bytes(in, b) + tokens * 4 * in.layout.head_dim;
}
__device__ int32_t packed_units(const BlockPlan& b) {
  return b.end_tile > b.first_tile ? (b.end_tile + kPieceTiles - 1) / kPieceTiles - b.first_tile / kPieceTiles : 0;
}

__device__ BlockPlan block_of(const Inputs& in, const RequestPlan& r, int32_t request, int32_t index,
                              const TilePlan* tiles) {
  BlockPlan b{};
  const int32_t page_tokens = in.layout.page_tokens;
  b.request = request;
  b.row = r.first_row;
  b.start = r.length - r.queries;
  b.length = r.length;
  b.first_column = index * in.columns;
  b.columns = min(in.columns, r.queries * in.group - b.first_column);
  const int32_t first = b.start + b.first_column / in.group,
                last = b.start + (b.first_column + b.columns - 1) / in.group;
  b.own_tile = first / page_tokens;
  b.own_tiles = last / page_tokens - b.own_tile + 1;
  b.end_tile = b.own_tile + b.own_tiles - 1;
  b.first_tile = in.window > 0 ? max(0, first - in.window + 1) / page_tokens : 0;
  b.units = packed_units(b);
  for (int i = 0; i < b.own_tiles; ++i) {
    b.units += pieces(own_tokens(in, b, i));
    b.raw[i] = tiles[r.first_tile + b.own_tile + i - b.start / page_tokens].raw;
  }
  return b;
}

// Where a CTA begins whose share starts at `bytes`.
__device__ Cut cut_at(const Inputs& in, const BlockPlan* blocks, int32_t count, int64_t bytes) {
  const int32_t index = last_at_most(count, bytes, [&](int32_t i) { return blocks[i].cost_before; });
  const BlockPlan& b = blocks[index];
  const int64_t size = block_bytes(in, b), inside = bytes - b.cost_before, packed = packed_bytes(in, b);
  const auto head = static_cast<int32_t>(inside / size);
  const int64_t rest = inside % size;
  int32_t unit;
  if (rest < packed) {
    // To the nearest edge of a piece; the first piece, which a window may have cut short, begins at 0.
    const auto tile = static_cast<int32_t>(rest / in.layout.record_bytes);
    unit = tile == 0 ? 0 : (b.first_tile + tile + kPieceTiles / 2) / kPieceTiles - b.first_tile / kPieceTiles;
  } else {
    unit = packed_units(b) +
           static_cast<int32_t>((rest - packed) / (int64_t{4} * in.layout.head_dim * kRawTokens));
  }
  Cut cut{index, head, min(unit, b.units), 0};
  if (cut.unit == b.units) cut.unit = 0, ++cut.head;
  if (cut.head == in.layout.kv_heads) cut.head = 0, ++cut.block;
  return cut;
}

__global__ void __launch_bounds__(kThreads) plan_kernel(Inputs in, Plan plan) {
  using CountScan = cub::BlockScan<Counts, kThreads>;
  using CostScan = cub::BlockScan<Costs, kThreads>;
  __shared__ union {
    CountScan::TempStorage counts;
    CostScan::TempStorage costs;
  } scan;
  __shared__ int32_t packs, cut_units[kThreads + 1];
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t requests = in.batch.requests, page_tokens = in.layout.page_tokens;
  const auto sum = [](const auto& a, const auto& b) { return a + b; };
  if (thread == 0) packs = 0;
  wait_for_previous();  // and no early start of the next kernel: attend reads the plan before it waits
  __syncthreads();

  Counts total{};
  for (int32_t base = 0; base < requests; base += kThreads) {
    RequestPlan r = base + thread < requests ? request_of(in, base + thread) : RequestPlan{};
    const int32_t tiles = tiles_of(in, r), first_tile = (r.length - r.queries) / page_tokens;
    const Counts mine{tiles, raw_tiles(in, r, first_tile, tiles),
                      in.columns > 0 ? (r.queries * in.group + in.columns - 1) / in.columns : 0};
    Counts before, all;
    CountScan(scan.counts).ExclusiveScan(mine, before, Counts{}, sum, all);
    before = total + before;
    r.first_tile = before.tiles;
    r.first_raw = before.raw;
    r.first_block = before.blocks;
    if (base + thread < requests) plan.requests[base + thread] = r;
    if (r.queries > 0) atomicAdd(&packs, r.length / page_tokens - first_tile);
    total = total + all;
    __syncthreads();
  }
  total = {min(total.tiles, in.max_tiles), min(total.raw, in.max_raw_tiles), min(total.blocks, in.max_blocks)};

  for (int32_t i = thread; i < total.tiles; i += kThreads) {
    const int32_t request =
        last_at_most(requests, i, [&](int32_t r) { return plan.requests[r].first_tile; });
    const RequestPlan r = plan.requests[request];
    const int32_t start = r.length - r.queries, index = i - r.first_tile, tile = start / page_tokens + index;
    const int32_t first = max(start, tile * page_tokens), end = min(r.length, (tile + 1) * page_tokens);
    const int32_t raw = r.first_raw + index;
    const bool in_pages = format::raw_in_pages(in.layout, tile, r.length);
    plan.tiles[i] = {request, tile, r.first_row + first - start, end - first,
                     in_pages ? -1 : min(raw, in.max_raw_tiles - 1)};
  }
  __syncthreads();

  Costs cost{};
  for (int32_t base = 0; base < total.blocks; base += kThreads) {
    const int32_t i = base + thread;
    BlockPlan b{};
    Costs mine{};
    if (i < total.blocks) {
      const int32_t request =
          last_at_most(requests, i, [&](int32_t r) { return plan.requests[r].first_block; });
      const RequestPlan r = plan.requests[request];
      b = block_of(in, r, request, i - r.first_block, plan.tiles);
      mine = {block_bytes(in, b) * in.layout.kv_heads, b.units * in.layout.kv_heads};
    }
    Costs before, all;
    CostScan(scan.costs).ExclusiveScan(mine, before, Costs{}, sum, all);
    before = cost + before;
    b.cost_before = before.bytes;
    b.units_before = before.units;
    if (i < total.blocks) plan.blocks[i] = b;
    cost = cost + all;
    __syncthreads();
  }

  if (in.columns > 0) {
    Cut cut{total.blocks, 0, 0, 0};
    int32_t first_unit = cost.units;
    if (thread < in.ctas && total.blocks > 0) {
      cut = cut_at(in, plan.blocks, total.blocks, cost.bytes / in.ctas * thread + cost.bytes % in.ctas * thread / in.ctas);
      if (cut.block < total.blocks) {
        const BlockPlan& b = plan.blocks[cut.block];
        first_unit = b.units_before + cut.head * b.units + cut.unit;
      }
    }
    if (thread <= in.ctas) cut_units[thread] = first_unit;
    __syncthreads();
    if (thread < in.ctas) cut.units = cut_units[thread + 1] - first_unit;
    if (thread <= in.ctas) plan.cuts[thread] = cut;
  }
  if (thread == 0) *plan.header = {total.tiles, total.raw, total.blocks, packs};
}

}  // namespace

cudaError_t plan(const Launch& launch, int32_t query_heads, int32_t window) {
  const int32_t group = query_heads / launch.layout.kv_heads;
  const Inputs in{launch.layout,
                  launch.step.batch,
                  launch.step.slots,
                  launch.step.tokens,
                  launch.limits.max_seq_len,
                  group,
                  query_heads > 0 ? block_columns(launch.layout, query_heads, launch.step.max_query_len) : 0,
                  window,
                  launch.ctas,
                  launch.map.max_tiles,
                  launch.map.max_raw_tiles,
                  launch.map.max_blocks};
  return launch_dependent(plan_kernel, dim3(1), dim3(kThreads), 0, launch.stream, in, launch.plan());
}

}  // namespace kvarn::cuda
