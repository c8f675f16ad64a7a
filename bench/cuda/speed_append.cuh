// SPDX-License-Identifier: Apache-2.0
// append: the pages after a step must be the CPU library's, byte for byte, before the step is timed.
#pragma once

#include "../feedback.hpp"
#include "speed_bench.cuh"

namespace speed {

struct AppendCase {
  const char* name;
  int rows;
  std::vector<int32_t> lengths;  // after the step
  bool feed = false;             // with feedback
  int layers = 0;                // > 0: what so many layers left to pack
  const char* verb() const { return layers > 0 ? "pack" : "append"; }
};

inline std::vector<AppendCase> append_cases() {
  const auto lengths = [](int requests, int completing) {
    std::vector<int32_t> all;
    for (int r = 0; r < requests; ++r) all.push_back(r < completing ? 256 : 133 + r * 49 % 122);
    return all;
  };
  return {{"prefill, 128 tiles complete", 16384, {16384}},
          {"decode, 128 of 128 tiles complete", 1, lengths(128, 128)},
          {"prefill, 128 tiles complete, feedback", 16384, {16384}, true},
          {"decode, 128 of 128 tiles complete, feedback", 1, lengths(128, 128), true},
          {"decode, 1 of 1 tiles complete, feedback", 1, lengths(1, 1), true},
          {"36 layers, 1 tile, feedback", 1, lengths(1, 1), true, 36},
          {"36 layers, 2 tiles, feedback", 1, lengths(2, 2), true, 36},
          {"36 layers, 4 tiles, feedback", 1, lengths(4, 4), true, 36},
          {"36 layers, 16 tiles, feedback", 1, lengths(16, 16), true, 36},
          {"36 layers, 1 tile", 1, lengths(1, 1), false, 36},
          {"36 layers, no tile, feedback", 1, lengths(32, 0), true, 36},
          {"decode, 8 of 8 tiles complete", 1, lengths(8, 8)},
          {"decode, 1 of 1 tiles complete", 1, lengths(1, 1)},
          {"decode, 1 of 32 tiles complete", 1, lengths(32, 1)},
          {"decode, none complete", 1, lengths(1, 0)},
          {"decode, none complete", 1, lengths(32, 0)},
          {"decode, none complete", 1, lengths(256, 0)},
          {"verify, none complete", 4, lengths(32, 0)}};
}

// Steps of a cache in host memory, by the CPU library.
class HostCache {
 public:
  HostCache(const kvarn_layout& layout, const Step& step)
      : layout_(layout),
        requests_(step.requests()),
        width_(step.batch().table_width),
        table_(static_cast<size_t>(requests_) * static_cast<size_t>(width_)),
        memory_(static_cast<size_t>(step.layer_bytes()) + 64) {
    check(cudaMemcpy(table_.data(), step.batch().block_table, table_.size() * 4, cudaMemcpyDeviceToHost), "table");
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data());
    pages_ = {memory_.data() + (64 - address % 64), step.pages(0).count, layout.page_bytes};
  }
  const uint8_t* data() const { return pages_.data; }

  // Appends lengths[r] - starts[r] rows of every request.
  void append(const std::vector<int32_t>& starts, const std::vector<int32_t>& lengths, const std::vector<uint16_t>& k,
              const std::vector<uint16_t>& v, const float* feedback = nullptr) {
    std::vector<int32_t> query_starts{0};
    for (size_t r = 0; r < lengths.size(); ++r) query_starts.push_back(query_starts[r] + lengths[r] - starts[r]);
    const int64_t tokens = query_starts.back(), heads = layout_.kv_heads, head_dim = layout_.head_dim;
    int64_t bytes = 0;
    const int32_t most = *std::max_element(lengths.begin(), lengths.end());
    check(kvarn_workspace_bytes(&layout_, tokens, requests_, 0, most, 1, &bytes), "workspace");
    std::vector<uint8_t> memory(static_cast<size_t>(bytes) + 64);
    const kvarn_workspace workspace{memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64), bytes};
    const kvarn_batch batch{requests_, width_, width_, table_.data(), lengths.data(), query_starts.data()};
    const kvarn_rows k_rows{k.data(), KVARN_BFLOAT16, tokens, heads, heads * head_dim, head_dim};
    const kvarn_rows v_rows{v.data(), KVARN_BFLOAT16, tokens, heads, heads * head_dim, head_dim};
    check(kvarn_append(&layout_, &pages_, &batch, &k_rows, &v_rows, KVARN_WEIGHTED, feedback, nullptr, &workspace,
                       nullptr, nullptr),
          "kvarn_append");
  }

 private:
  kvarn_layout layout_;
  int32_t requests_, width_;
  std::vector<int32_t> table_;
  std::vector<uint8_t> memory_;
  kvarn_pages pages_{};
};

// What a step has to move: its k and v in, raw tokens that stay, and of every completed tile the older raw tokens in
// and the records out; or pack, raw tokens in and records out.
inline int64_t moved_bytes(const kvarn_layout& l, const AppendCase& c) {
  if (c.layers > 0) {
    const int64_t tiles = std::ranges::count_if(c.lengths, [&](int32_t n) { return n % l.page_tokens == 0; });
    return c.layers * l.kv_heads * tiles * (l.record_bytes + 4 * l.page_tokens * l.head_dim);
  }
  int64_t raw_tokens = 0, records = 0, rows = 0;
  for (int32_t length : c.lengths) {
    const int32_t start = length - c.rows;
    rows += c.rows;
    for (int32_t tile = start / l.page_tokens; tile * l.page_tokens < length; ++tile) {
      const int32_t first = tile * l.page_tokens, end = first + l.page_tokens;
      if (kvarn::format::raw_in_pages(l, tile, length)) raw_tokens += std::min(length, end) - std::max(start, first);
      if (end <= length) ++records, raw_tokens += std::max(start - first, 0);
    }
  }
  return l.kv_heads * (records * l.record_bytes + (rows + raw_tokens) * 4 * l.head_dim);
}

inline void append_checked(Bench& bench, const char* preset, int head_dim, int kv_heads, const AppendCase& c) {
  const Shape shape{preset, head_dim, 0, kv_heads, static_cast<int>(c.lengths.size()), c.rows};
  const kvarn_layout layout = layout_of(shape);
  const Step step(layout, c.lengths, c.rows, bench.pool, bench.pool_bytes, 64);
  if (c.layers > step.layers()) throw std::runtime_error("the pool is too small for these layers");
  const Workspace memory(layout, step.tokens(), step.requests(), 0, step.max_length());
  const kvarn_cuda_workspace workspace = memory;

  std::vector<int32_t> starts = c.lengths;
  for (int32_t& start : starts) start -= c.rows;
  const int64_t history = std::accumulate(starts.begin(), starts.end(), int64_t{0});
  HostCache host(layout, step);
  if (history > 0)
    host.append(std::vector<int32_t>(starts.size(), 0), starts,
                Rows(history, kv_heads, head_dim, KVARN_BFLOAT16, 1).host(),
                Rows(history, kv_heads, head_dim, KVARN_BFLOAT16, 2).host());
  for (int layer = 0; layer < step.layers(); ++layer)
    check(cudaMemcpy(step.pages(layer).data, host.data(), step.layer_bytes(), cudaMemcpyHostToDevice), "pages");

  const Rows k(step.tokens(), kv_heads, head_dim, KVARN_BFLOAT16, 3),
      v(step.tokens(), kv_heads, head_dim, KVARN_BFLOAT16, 4);
  kvarn_cuda_step device_step = step.step();
  device_step.defer = c.layers > 0;
  const kvarn_rows k_rows = k.in(), v_rows = v.in();
  check(kvarn_cuda_plan(&layout, &device_step, 0, 0, &workspace, nullptr), "plan");
  check(cudaDeviceSynchronize(), "plan");
  const std::vector<float> matrices = timed::feedback(kv_heads, head_dim);
  const Device<float> on_device(matrices);
  const float* feedback = c.feed ? on_device.data() : nullptr;
  std::vector<kvarn_cuda_layer> layers;
  for (int layer = 0; layer < c.layers; ++layer) layers.push_back({step.pages(layer), feedback});
  const auto append = [&](cudaStream_t stream, int layer) {
    const kvarn_pages pages = step.pages(layer);
    check(kvarn_cuda_append(&layout, &pages, &device_step, &k_rows, &v_rows, KVARN_WEIGHTED, feedback, nullptr, nullptr,
                            &workspace, stream),
          "append");
  };
  const auto launch = [&](cudaStream_t stream, int layer) {
    if (c.layers == 0) return append(stream, layer);
    check(kvarn_cuda_pack(&layout, layers.data(), c.layers, &device_step, KVARN_WEIGHTED, &workspace, stream), "pack");
  };
  host.append(starts, c.lengths, k.host(), v.host(), c.feed ? matrices.data() : nullptr);
  const auto compare = [&](int layer, const char* when) {
    std::vector<uint8_t> got(static_cast<size_t>(step.layer_bytes()));
    check(cudaMemcpy(got.data(), step.pages(layer).data, got.size(), cudaMemcpyDeviceToHost), "pages");
    if (std::memcmp(got.data(), host.data(), got.size()) != 0)
      throw std::runtime_error(std::string("the pages are not the CPU's ") + when);
  };
  for (int layer = 0; layer < c.layers; ++layer) append(nullptr, layer);
  launch(nullptr, 0);
  check(cudaDeviceSynchronize(), "append");
  for (int layer = 0; layer < std::max(1, c.layers); ++layer) compare(layer, "after one step");
  if (!bench.timed) return;

  const int launches = c.rows > 1000 || c.layers > 0 ? 8 : std::max(step.layers(), 8),
            last = (launches - 1) % step.layers();
  const Timing timing = time_graph(launches, launch);
  compare(last, "after the timed steps");
  bench.report(c.verb(), preset,
               std::string(c.name) + ", " + std::to_string(kv_heads) + " heads D" + std::to_string(head_dim) +
                   ", batch " + std::to_string(c.lengths.size()),
               c.rows, "", timing, moved_bytes(layout, c), 0);
}

inline void append(Bench& bench, const char* preset, int head_dim, int kv_heads, const AppendCase& c) {
  bench.run(std::string(c.verb()) + " " + preset + " " + c.name + " " + std::to_string(c.lengths.size()),
            [&] { append_checked(bench, preset, head_dim, kv_heads, c); });
}

}  // namespace speed
