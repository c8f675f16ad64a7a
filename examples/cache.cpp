// SPDX-License-Identifier: Apache-2.0
// The C++ interface with threads of the caller: two requests of different lengths in one step.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <kvarn/kvarn.hpp>
#include <random>
#include <thread>
#include <vector>

namespace {

// The smallest pool that fits kvarn::executor.
struct Threads {
  int threads() const { return 2; }
  template <class Body>
  void run(int64_t tasks, Body body) {
    std::atomic<int64_t> next = 0;
    std::vector<std::jthread> workers;
    for (int32_t t = 0; t < threads(); ++t)
      workers.emplace_back([&, t] {
        for (int64_t i; (i = next++) < tasks;) body(i, t);
      });
  }
};

}  // namespace

int main() {
  constexpr int kv_heads = 2, query_heads = 8, head_dim = 128;
  kvarn::Layout layout;
  if (kvarn::Status s = kvarn::Layout::make("kvarn_k4v3_g128", head_dim, kv_heads, layout); !s)
    return std::fprintf(stderr, "%s\n", s.message().c_str()), 1;

  const std::vector<int32_t> lengths{300, 40}, starts{0, 300, 340};
  const int32_t tokens = starts.back(), width = static_cast<int32_t>(layout.pages_of(300));
  std::vector<int32_t> table(static_cast<size_t>(2 * width));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  const kvarn::WorkspaceBuffer memory(2 * width * layout.page_bytes);
  const kvarn_pages pages{static_cast<uint8_t*>(static_cast<kvarn_workspace>(memory).data), 2 * width,
                          layout.page_bytes};
  const kvarn_batch batch{2, width, width, table.data(), lengths.data(), starts.data()};

  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const auto random = [&](int heads) {
    std::vector<float> x(static_cast<size_t>(tokens * heads * head_dim));
    for (float& value : x) value = normal(generator);
    return x;
  };
  const std::vector<float> k = random(kv_heads), v = random(kv_heads), q = random(query_heads);
  std::vector<float> out(q.size());

  Threads threads;
  const kvarn_executor executor = kvarn::executor(threads);
  const kvarn_options options{&executor, nullptr};
  const kvarn::WorkspaceBuffer workspace(layout.workspace_bytes(tokens, 2, query_heads, 300, threads.threads()));
  const auto rows = [&](const std::vector<float>& x, int heads) {
    return kvarn::rows(x.data(), KVARN_FLOAT32, tokens, heads, head_dim);
  };
  if (kvarn::Status s = kvarn::append(layout, pages, batch, rows(k, kv_heads), rows(v, kv_heads), workspace,
                                      KVARN_WEIGHTED, &options);
      !s)
    return std::fprintf(stderr, "%s\n", s.message().c_str()), 1;
  if (kvarn::Status s = kvarn::attend(layout, pages, batch, rows(q, query_heads),
                                      kvarn::rows_out(out.data(), KVARN_FLOAT32, tokens, query_heads, head_dim),
                                      {.scale = 1 / std::sqrt(float{head_dim})}, workspace, &options);
      !s)
    return std::fprintf(stderr, "%s\n", s.message().c_str()), 1;
  for (float x : out)
    if (!std::isfinite(x)) return 1;
  std::printf("%d and %d tokens attended, %.3f bits a value\n", lengths[0], lengths[1],
              8.0 * static_cast<double>(layout.record_bytes) / (2.0 * layout.page_tokens * head_dim));
  return 0;
}
