// SPDX-License-Identifier: Apache-2.0
// append, attend and expand through the C ABI, one thread. Before it times a target, each benchmark compares it with
// the scalar reference: records and expanded values bit for bit, attend to 4e-4.
//
//   bench_verbs --benchmark_out=bench/results/cpu-verbs.json --benchmark_out_format=json
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "../feedback.hpp"
#include "kvarn/kvarn.hpp"

namespace {

struct Setup {
  kvarn::Layout layout{};
  int32_t tokens, heads, query_heads;
  std::vector<int32_t> table;
  kvarn::WorkspaceBuffer memory, workspace;
  kvarn_pages pages;
  std::vector<float> k, v, q, out, feedback;  // feedback: empty for none

  Setup(const char* preset, int32_t head_dim, int32_t kv_heads, int32_t queries, int32_t count)
      : tokens(count),
        heads(kv_heads),
        query_heads(queries),
        memory(bytes(preset, head_dim, kv_heads, count, layout)),
        workspace(layout.workspace_bytes(count, 1, queries, count)),
        pages{static_cast<uint8_t*>(static_cast<kvarn_workspace>(memory).data), layout.pages_of(count),
              layout.page_bytes} {
    for (int32_t i = 0; i < pages.count; ++i) table.push_back(i);
    uint32_t state = 1;
    const auto fill = [&state](std::vector<float>& x, int64_t size) {
      for (x.resize(static_cast<size_t>(size)); float& value : x) {  // a sum of four bytes: about normal
        state = state * 1664525u + 1013904223u;
        value = static_cast<float>((state & 255) + (state >> 8 & 255) + (state >> 16 & 255) + (state >> 24)) / 128.0f -
                4.0f;
      }
    };
    fill(k, int64_t{count} * kv_heads * head_dim);
    fill(v, int64_t{count} * kv_heads * head_dim);
    fill(q, int64_t{queries} * head_dim);
    out.resize(q.size());
  }
  static int64_t bytes(const char* preset, int32_t head_dim, int32_t kv_heads, int32_t count, kvarn::Layout& layout) {
    return kvarn::Layout::make(preset, head_dim, kv_heads, layout) ? layout.pages_of(count) * layout.page_bytes : 0;
  }
  kvarn_batch batch(const int32_t* length, const int32_t* starts) const {
    const auto width = static_cast<int32_t>(table.size());
    return {1, width, width, table.data(), length, starts};
  }
  bool append(const char* target, kvarn_encoder encoder) {
    const int32_t length = tokens, starts[2] = {0, tokens};
    const kvarn_options options{nullptr, target};
    const auto rows = [&](const std::vector<float>& x) {
      return kvarn::rows(x.data(), KVARN_FLOAT32, tokens, heads, layout.head_dim);
    };
    return static_cast<bool>(kvarn::append(layout, pages, batch(&length, starts), rows(k), rows(v), workspace, encoder,
                                           &options, nullptr, feedback.empty() ? nullptr : feedback.data()));
  }
  bool attend(const char* target) {  // the last token decodes
    const int32_t length = tokens, starts[2] = {0, 1};
    const kvarn_options options{nullptr, target};
    return static_cast<bool>(kvarn::attend(
        layout, pages, batch(&length, starts), kvarn::rows(q.data(), KVARN_FLOAT32, 1, query_heads, layout.head_dim),
        kvarn::rows_out(out.data(), KVARN_FLOAT32, 1, query_heads, layout.head_dim),
        {.scale = 1 / std::sqrt(static_cast<float>(layout.head_dim))}, workspace, &options));
  }
  std::vector<uint8_t> record(int32_t tile) const {
    const uint8_t* page = pages.data + tile * pages.stride;
    return {page, page + layout.record_bytes};
  }
};

void append_tile(benchmark::State& state, const char* preset, int32_t head_dim, const char* target,
                 kvarn_encoder encoder, bool feed) {
  Setup reference(preset, head_dim, 1, 1, 1024), setup(preset, head_dim, 1, 1, 1024);
  if (feed) reference.feedback = setup.feedback = timed::feedback(1, head_dim);
  if (!reference.append("scalar", encoder) || !setup.append(target, encoder) || reference.record(3) != setup.record(3))
    return state.SkipWithError("the record is not the reference's");
  for (auto _ : state) setup.append(target, encoder);
  const double tiles = 1024.0 / setup.layout.page_tokens;
  state.counters["seconds_per_tile"] =
      benchmark::Counter(tiles, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void attend_row(benchmark::State& state, const char* preset, int32_t head_dim, int32_t group, const char* target) {
  Setup setup(preset, head_dim, 2, 2 * group, 4096);
  if (!setup.append(target, KVARN_WEIGHTED) || !setup.attend("scalar"))
    return state.SkipWithError("the reference failed");
  const std::vector<float> expected = setup.out;
  if (!setup.attend(target)) return state.SkipWithError("attend failed");
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(setup.out[i] - expected[i], 2.0);
    norm += std::pow(expected[i], 2.0);
  }
  if (!(std::sqrt(difference / norm) < 4e-4)) return state.SkipWithError("attend is not the reference's");
  for (auto _ : state) setup.attend(target);
  const double tiles = 2 * 4096.0 / setup.layout.page_tokens;
  state.counters["seconds_per_tile"] =
      benchmark::Counter(tiles, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations()) * static_cast<int64_t>(tiles) *
                          setup.layout.record_bytes);
}

}  // namespace

int main(int argc, char** argv) {
  for (const char* const* target = kvarn_targets(); *target != nullptr; ++target) {
    const std::string name = *target;
    if (name == "scalar") continue;
    for (const char* const* preset = kvarn_presets(); *preset != nullptr; ++preset)
      for (int head_dim : {64, 128, 256}) {
        const std::string shape = std::string(*preset) + "/D" + std::to_string(head_dim) + "/" + name;
        benchmark::RegisterBenchmark(("append/weighted/" + shape).c_str(), append_tile, *preset, head_dim, *target,
                                     KVARN_WEIGHTED, false);
        for (int group : {1, 4, 8})
          benchmark::RegisterBenchmark(("attend/gqa" + std::to_string(group) + "/" + shape).c_str(), attend_row,
                                       *preset, head_dim, group, *target);
      }
    benchmark::RegisterBenchmark(("append/varnorm/kvarn_k4v2_g128/D128/" + name).c_str(), append_tile,
                                 "kvarn_k4v2_g128", 128, *target, KVARN_VARNORM, false);
    for (int head_dim : {64, 128, 256})
      benchmark::RegisterBenchmark(
          ("append/feedback/kvarn_k4v2_g128/D" + std::to_string(head_dim) + "/" + name).c_str(), append_tile,
          "kvarn_k4v2_g128", head_dim, *target, KVARN_WEIGHTED, true);
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
