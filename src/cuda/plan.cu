// SPDX-License-Identifier: Apache-2.0
// The plan of a step, made by one CTA: scans over requests, then over query tiles, blocks and cuts.
#include <cub/block/block_scan.cuh>

#include "cuda/attend.hpp"
#include "cuda/device.cuh"
#include "cuda/launch.hpp"
#include "cuda/plan_blocks.cuh"
#include "cuda/plan_cuts.cuh"
#include "cuda/plan_deferred.cuh"

namespace kvarn::cuda {
namespace {

constexpr int kThreads = 1024;

struct Counts {
  int32_t tiles, raw, blocks;
  __device__ friend Counts operator+(const Counts& a, const Counts& b) {
    return {a.tiles + b.tiles, a.raw + b.raw, a.blocks + b.blocks};
  }
};

// What the host could not check is checked here: a request that makes no sense takes no part.
__device__ RequestPlan request_of(const PlanInputs& in, int32_t r) {
  const int32_t length = in.batch.seq_lens[r], first = in.batch.query_starts[r], end = in.batch.query_starts[r + 1];
  const bool ordered = r == 0 || in.batch.query_starts[r - 1] <= first;  // else its rows may be another's
  const bool valid = ordered && length > 0 && length <= in.max_seq_len && first >= 0 && end > first &&
                     end <= in.tokens && end - first <= length &&
                     format::pages_of(in.layout, length) <= in.batch.table_width &&
                     (in.slots == nullptr || in.slots[first] >= 0);
  return valid ? RequestPlan{length, end - first, first, 0, 0, 0, 0} : RequestPlan{};
}

// Query tiles of a request whose raw tokens have left the pages: its lowest ones.
__device__ int32_t raw_tiles(const PlanInputs& in, const RequestPlan& r, int32_t first_tile, int32_t tiles) {
  int32_t count = 0;
  // raw_in_pages(tile): length - (tile + 1) G <= n, so the first one inside is ceil((length - n) / G) - 1
  const int32_t beyond = r.length - in.layout.raw_tokens_per_page;
  if (beyond > 0) count = (beyond + in.layout.page_tokens - 1) / in.layout.page_tokens - 1 - first_tile;
  return min(max(count, 0), tiles);
}

__device__ int32_t tiles_of(const PlanInputs& in, const RequestPlan& r) {
  return r.queries == 0 ? 0
                        : (r.length - 1) / in.layout.page_tokens - (r.length - r.queries) / in.layout.page_tokens + 1;
}

__global__ void __launch_bounds__(kThreads, 1) plan_kernel(PlanInputs in, Plan plan) {
  using CountScan = cub::BlockScan<Counts, kThreads>;
  using CostScan = cub::BlockScan<Costs, kThreads>;
  __shared__ union {
    CountScan::TempStorage counts;
    CostScan::TempStorage costs;
  } scan;
  __shared__ int32_t packs, deferrable, least_tile, most_tile;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t requests = in.batch.requests, page_tokens = in.layout.page_tokens;
  const auto sum = [](const auto& a, const auto& b) { return a + b; };
  if (thread == 0) packs = deferrable = most_tile = 0, least_tile = INT32_MAX;
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
    r.deferred = in.defer && r.queries > 0 && r.length % page_tokens == 0;
    if (base + thread < requests) plan.requests[base + thread] = r;
    if (r.deferred != 0) plan.deferred[atomicAdd(&deferrable, 1)] = base + thread;
    if (r.queries > 0) {
      atomicAdd(&packs, r.length / page_tokens - first_tile);
      atomicMin(&least_tile, first_tile), atomicMax(&most_tile, first_tile);
    }
    total = total + all;
    __syncthreads();
  }
  const bool even = nearly_even(least_tile, most_tile);
  const int32_t deferred = deferrable > 0 ? settle_deferred<kThreads>(in, plan, deferrable) : 0;
  total = {min(total.tiles, in.max_tiles), min(total.raw, in.max_raw_tiles), min(total.blocks, in.max_blocks)};

  for (int32_t i = thread; i < total.tiles; i += kThreads) {
    const int32_t request = last_at_most(requests, i, [&](int32_t r) { return plan.requests[r].first_tile; });
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
      const int32_t request = last_at_most(requests, i, [&](int32_t r) { return plan.requests[r].first_block; });
      const RequestPlan r = plan.requests[request];
      b = block_of(in, r, request, i - r.first_block, plan.tiles);
      mine = {int64_t{weight_of(b)} * in.layout.kv_heads, b.steps * in.layout.kv_heads};
    }
    Costs before, all;
    CostScan(scan.costs).ExclusiveScan(mine, before, Costs{}, sum, all);
    before = cost + before;
    b.weight_before = before.weight;
    b.steps_before = before.steps;
    if (i < total.blocks) plan.blocks[i] = b;
    cost = cost + all;
    __syncthreads();
  }

  if (in.columns > 0) {
    for (int32_t cta = thread; cta <= in.ctas; cta += kThreads)
      plan.cuts[cta * in.teams] = cut_of_cta(in, plan.blocks, total.blocks, cost, even, cta);
    __syncthreads();
    // A CTA's first list begins with it; 7 others of 132 CTAs are a round of these threads.
    const int32_t others = in.teams - 1;
    for (int32_t i = thread; i < in.ctas * others; i += kThreads) {
      const int32_t first = i / others * in.teams, list = 1 + i % others;
      plan.cuts[first + list] =
          cut_of_list(in, plan.blocks, total.blocks, plan.cuts[first], plan.cuts[first + in.teams], cost, list);
    }
  }
  if (thread == 0) *plan.header = {total.tiles, total.raw, total.blocks, packs - deferred, deferred};
}

}  // namespace

cudaError_t plan(const Launch& launch, int32_t query_heads, int32_t window) {
  PlanInputs in{launch.layout,
                launch.step.batch,
                launch.step.slots,
                launch.step.tokens,
                launch.limits.max_seq_len,
                0,
                0,
                window,
                launch.ctas,
                0,
                launch.step.defer != 0,
                launch.map.max_tiles,
                launch.map.max_raw_tiles,
                launch.map.max_blocks};
  if (query_heads > 0) {
    in.group = query_heads / launch.layout.kv_heads;
    Division division;
    const cudaError_t error = divide(launch.layout, query_heads, launch.step.max_query_len, division);
    if (error != cudaSuccess) return error;
    in.columns = division.columns;
    in.teams = division.teams;
  }
  return launch_dependent(plan_kernel, dim3(1), dim3(kThreads), 0, launch.stream, in, launch.plan());
}

}  // namespace kvarn::cuda
