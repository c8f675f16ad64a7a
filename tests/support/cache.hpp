// SPDX-License-Identifier: Apache-2.0
// A pool of pages with one or more requests, for tests: random but repeatable input, guarded margins.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "kvarn/kvarn.hpp"
#include "support/hashed.hpp"

namespace kvarn::test {

inline std::vector<std::string> targets() {
  std::vector<std::string> out;
  for (const char* const* name = kvarn_targets(); *name != nullptr; ++name) out.emplace_back(*name);
  return out;
}

// Threads that take indices from a counter.
struct Pool {
  int count;
  int threads() const { return count; }
  template <class Body>
  void run(int64_t tasks, Body body) {
    std::atomic<int64_t> next = 0;
    std::vector<std::jthread> workers;
    for (int32_t t = 0; t < count; ++t)
      workers.emplace_back([&, t] {
        for (int64_t i; (i = next++) < tasks;) body(i, t);
      });
  }
};

// One request over its own pool, its pages in a scrambled order.
struct Request {
  Layout layout;
  int32_t query_heads, length = 0;
  std::vector<uint8_t> memory;
  kvarn_pages pages;
  std::vector<int32_t> table;
  std::vector<float> k, v, q, out;
  WorkspaceBuffer workspace;
  kvarn_options options{nullptr, nullptr};
  std::vector<float> feedback;  // empty: none

  Request(const std::string& preset, int32_t head_dim, int32_t kv_heads, int32_t heads, int32_t tokens,
          uint32_t seed = 1, int32_t threads = 1)
      : layout(make(preset, head_dim, kv_heads)),
        query_heads(heads),
        memory(static_cast<size_t>(layout.pages_of(tokens) * layout.page_bytes + 64), uint8_t{0xff}),
        pages{aligned(memory.data()), layout.pages_of(tokens), layout.page_bytes},
        k(hashed_rows(static_cast<size_t>(tokens * kv_heads * head_dim), seed)),
        v(hashed_rows(k.size(), seed + 1)),
        q(hashed_rows(static_cast<size_t>(tokens * heads * head_dim), seed + 2)),
        out(q.size(), std::nanf("")),
        workspace(layout.workspace_bytes(tokens, 1, heads, tokens, threads)) {
    for (int32_t i = 0; i < pages.count; ++i) table.push_back(static_cast<int32_t>((i * 7 + 3) % pages.count));
    if (pages.count % 7 == 0)
      for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(table.size() - 1 - i);
  }

  // Appends and attends the next `count` tokens.
  void step(int32_t count, kvarn_encoder encoder = KVARN_WEIGHTED) {
    const int32_t heads = layout.kv_heads, d = layout.head_dim, end = length + count, starts[2] = {0, count};
    const kvarn_batch batch{
        1, static_cast<int32_t>(table.size()), static_cast<int64_t>(table.size()), table.data(), &end, starts};
    const auto at = [&](std::vector<float>& rows, int32_t per_token) {
      return rows.data() + int64_t{length} * per_token * d;
    };
    const Status a = append(layout, pages, batch, rows(at(k, heads), KVARN_FLOAT32, count, heads, d),
                            rows(at(v, heads), KVARN_FLOAT32, count, heads, d), workspace, encoder, &options, nullptr,
                            feedback.empty() ? nullptr : feedback.data());
    ASSERT_TRUE(a) << a.message();
    const Status b = attend(layout, pages, batch, rows(at(q, query_heads), KVARN_FLOAT32, count, query_heads, d),
                            rows_out(at(out, query_heads), KVARN_FLOAT32, count, query_heads, d), {.scale = .1f},
                            workspace, &options);
    ASSERT_TRUE(b) << b.message();
    length = end;
  }

  const uint8_t* page(int32_t tile) const { return pages.data + table[static_cast<size_t>(tile)] * pages.stride; }
  std::vector<uint8_t> packed() const {  // every complete tile's page
    std::vector<uint8_t> bytes;
    for (int32_t t = 0; t < length / layout.page_tokens; ++t)
      bytes.insert(bytes.end(), page(t), page(t) + layout.page_bytes);
    return bytes;
  }
  // k and v of the complete tiles, [tokens][kv_heads][head_dim] each, one after the other.
  std::vector<float> expanded() {
    const int64_t tokens = length / layout.page_tokens * layout.page_tokens,
                  size = tokens * layout.kv_heads * layout.head_dim;
    std::vector<float> both(static_cast<size_t>(2 * size));
    const kvarn_batch batch{
        1, static_cast<int32_t>(table.size()), static_cast<int64_t>(table.size()), table.data(), &length, nullptr};
    const auto half = [&](int64_t offset) {
      return rows_out(both.data() + offset, KVARN_FLOAT32, tokens, layout.kv_heads, layout.head_dim);
    };
    const Status s = expand(layout, pages, batch, half(0), half(size), workspace, &options);
    EXPECT_TRUE(s) << s.message();
    return both;
  }

 private:
  static Layout make(const std::string& preset, int32_t head_dim, int32_t kv_heads) {
    Layout layout{};
    const Status s = Layout::make(preset, head_dim, kv_heads, layout);
    EXPECT_TRUE(s) << s.message();
    return layout;
  }
  static uint8_t* aligned(uint8_t* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }
};

inline double relative_error(const std::vector<float>& a, const std::vector<float>& reference) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(double{a[i]} - double{reference[i]}, 2);
    norm += std::pow(double{reference[i]}, 2);
  }
  return std::sqrt(difference / norm);
}

}  // namespace kvarn::test
