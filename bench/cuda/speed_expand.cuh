// SPDX-License-Identifier: Apache-2.0
// expand and the pages of prefill: every element must be the specification's bits.
#pragma once

#include "speed_bench.cuh"

namespace speed {

inline void expand(Bench& bench, const Shape& s) {
  bench.run(std::string("expand ") + s.preset + " " + s.name(), [&] {
    const kvarn_layout layout = layout_of(s);
    const Step step(layout, s.lengths(layout.page_tokens), 1, bench.pool, bench.pool_bytes, 64);
    step.fill(1);
    std::vector<reference::Expanded> tiles;
    for (int r = 0; r < step.requests(); ++r)
      for (int tile = 0; tile < step.lengths()[static_cast<size_t>(r)] / layout.page_tokens; ++tile)
        tiles.push_back({r, tile, static_cast<int>(tiles.size())});
    const auto count = static_cast<int64_t>(tiles.size());
    const Workspace memory(layout, 1, step.requests(), 0, step.max_length());
    const kvarn_cuda_workspace workspace = memory;
    Rows k(count * layout.page_tokens, s.kv_heads, s.head_dim, KVARN_FLOAT16);
    Rows v(count * layout.page_tokens, s.kv_heads, s.head_dim, KVARN_FLOAT16);
    const kvarn_batch batch = step.batch();
    const auto launch = [&](cudaStream_t stream, int layer) {
      const kvarn_pages pages = step.pages(layer);
      check(kvarn_cuda_expand(&layout, &pages, &batch, &k.out(), &v.out(), &workspace, stream), "expand");
    };
    launch(nullptr, 0);
    check(cudaDeviceSynchronize(), "expand");
    reference::check_expanded(step, 0, tiles, k.as<__half>(), v.as<__half>(), "after one launch");
    if (!bench.timed) return;

    const int64_t bytes = count * s.kv_heads * (layout.record_bytes + int64_t{4} * layout.page_tokens * s.head_dim);
    const int launches = launches_for(bytes), last = (launches - 1) % step.layers();
    k.poison(), v.poison();
    const Timing timing = time_graph(launches, launch);
    reference::check_expanded(step, last, tiles, k.as<__half>(), v.as<__half>(), "after the timed launches");
    bench.report("expand", s.preset, s.name(), 1, "", timing, bytes, 0);
  });
}

// One request's chunk of s.rows tokens: the tables and pages that prefill's attention kernel reads. Bytes: the records
// before the last query tile and the raw query tiles in, all of that out in 16 bits.
inline void prefill(Bench& bench, const Shape& s) {
  bench.run(std::string("expand prefill ") + s.preset + " " + s.name(), [&] {
    const kvarn_layout layout = layout_of(s);
    const int32_t length = s.tokens, tiles = length / layout.page_tokens, own = s.rows / layout.page_tokens;
    const Step step(layout, {length}, s.rows, bench.pool, bench.pool_bytes, 32);
    step.fill(1);
    const Workspace memory(layout, s.rows, 1, 0, length);
    const kvarn_cuda_workspace workspace = memory;
    const kvarn_cuda_step device_step = step.step();
    const Rows new_k(s.rows, s.kv_heads, s.head_dim, KVARN_FLOAT16, 1);
    const Rows new_v(s.rows, s.kv_heads, s.head_dim, KVARN_FLOAT16, 2);
    const kvarn_rows k_rows = new_k.in(), v_rows = new_v.in();
    check(kvarn_cuda_plan(&layout, &device_step, 0, 0, &workspace, nullptr), "plan");
    for (int layer = 0; layer < step.layers(); ++layer) {
      const kvarn_pages pages = step.pages(layer);
      check(kvarn_cuda_append(&layout, &pages, &device_step, &k_rows, &v_rows, KVARN_WEIGHTED, nullptr, nullptr,
                              nullptr, &workspace, nullptr),
            "append");
    }
    const int32_t sequences = own + 2, width = tiles + 1, room = tiles + own;
    const Device<int32_t> table(static_cast<size_t>(sequences * width)), lengths(static_cast<size_t>(sequences));
    const Device<int32_t> starts(static_cast<size_t>(sequences) + 1), overflow(1);
    const kvarn_cuda_prefill tables{
        0, 1, width, sequences, table.data(), lengths.data(), starts.data(), room, overflow.data()};
    Rows k(int64_t{room} * layout.page_tokens, s.kv_heads, s.head_dim, KVARN_FLOAT16);
    Rows v(int64_t{room} * layout.page_tokens, s.kv_heads, s.head_dim, KVARN_FLOAT16);
    const auto launch = [&](cudaStream_t stream, int layer) {
      const kvarn_pages pages = step.pages(layer);
      check(kvarn_cuda_prefill_pages(&layout, &pages, &device_step, &tables, &k.out(), &v.out(), &workspace, stream),
            "prefill_pages");
    };
    const auto compare = [&](int layer, const char* when) {
      const std::vector<int32_t> host_table = table.host(), host_lengths = lengths.host();
      if (overflow.host()[0] != 0 || host_lengths[static_cast<size_t>(own) - 1] != length)
        throw std::runtime_error("the last query tile's sequence is not the whole request");
      std::vector<reference::Expanded> expanded;
      for (int tile = 0; tile < tiles - 1; ++tile) {
        const int32_t page = host_table[static_cast<size_t>((own - 1) * width + tile)];
        if (page < 0 || page >= room) throw std::runtime_error("the block table names a page outside");
        expanded.push_back({0, tile, page});
      }
      reference::check_expanded(step, layer, expanded, k.as<__half>(), v.as<__half>(), when);
    };
    launch(nullptr, 0);
    check(cudaDeviceSynchronize(), "prefill_pages");
    compare(0, "after one launch");
    if (!bench.timed) return;

    const int64_t raw_bytes = int64_t{4} * layout.page_tokens * s.head_dim;
    const int64_t bytes = s.kv_heads * ((tiles - 1) * (layout.record_bytes + raw_bytes) + own * 2 * raw_bytes);
    const int launches = launches_for(bytes), last = (launches - 1) % step.layers();
    k.poison(), v.poison();
    const Timing timing = time_graph(launches, launch);
    compare(last, "after the timed launches");
    bench.report("prefill", s.preset, s.name(), s.rows, "", timing, bytes, 0);
  });
}

}  // namespace speed
