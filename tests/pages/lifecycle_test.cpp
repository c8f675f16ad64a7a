// SPDX-License-Identifier: Apache-2.0
// A row's bits depend on its own tokens only: not on chunking, threads or other requests.
#include <gtest/gtest.h>

#include <numeric>

#include "support/cache.hpp"

namespace kvarn::test {
namespace {

constexpr int32_t kTokens = 700;

std::vector<float> whole_prompt(const std::string& preset) {
  Request request(preset, 64, 2, 6, kTokens);
  request.step(kTokens);
  return request.out;
}

TEST(Lifecycle, ChunksDoNotChangeABit) {
  for (const char* preset : {"kvarn_k4v2_g128", "kvarn_k2v2_g64"}) {
    const std::vector<float> expected = whole_prompt(preset);
    for (int32_t chunk : {1, 27, 28, 29, 37, 64, 90, 127, 128, 129, 200, 333}) {
      Request request(preset, 64, 2, 6, kTokens);
      while (request.length < kTokens) request.step(std::min(chunk, kTokens - request.length));
      EXPECT_EQ(request.out, expected) << preset << " in chunks of " << chunk;
    }
  }
}

TEST(Lifecycle, RejectedDraftsLeaveNoTrace) {
  const std::vector<float> expected = whole_prompt("kvarn_k4v2_g128");
  Request request("kvarn_k4v2_g128", 64, 2, 6, kTokens);
  const int32_t most = request.layout.raw_tokens_per_page;
  request.step(90);
  for (uint32_t turn = 0; request.length < kTokens; ++turn) {
    const int32_t drafts =
        std::min(static_cast<int32_t>(mix(turn) % static_cast<uint32_t>(most + 1)), kTokens - request.length - 1);
    const int32_t accepted = drafts == 0 ? 0 : static_cast<int32_t>(mix(turn + 99) % static_cast<uint32_t>(drafts + 1));
    const int32_t before = request.length;
    const std::vector<float> k = request.k, v = request.v;
    const auto rejected = (before + 1 + accepted) * 2 * 64;
    for (auto i = static_cast<size_t>(rejected);
         i < std::min(k.size(), static_cast<size_t>((before + 1 + drafts) * 128)); ++i)
      request.k[i] = 7, request.v[i] = -7;
    request.step(1 + drafts);
    request.length = before + 1 + accepted;
    request.k = k, request.v = v;
  }
  // Rows of rejected drafts were written again by the step that replaced them.
  EXPECT_EQ(request.out, expected);
}

TEST(Lifecycle, ThreadsDoNotChangeABit) {
  constexpr int32_t kLong = 5000;  // more than one segment of 32 tiles
  Request alone("kvarn_k4v2_g128", 64, 1, 4, kLong);
  alone.step(kLong - 3);
  alone.step(3);
  for (int count : {2, 3, 7}) {
    Pool pool{count};
    const kvarn_executor run = executor(pool);
    Request request("kvarn_k4v2_g128", 64, 1, 4, kLong, 1, count);
    request.options.executor = &run;
    request.step(kLong - 3);
    request.step(3);
    EXPECT_EQ(request.out, alone.out) << count << " threads";
    EXPECT_EQ(request.packed(), alone.packed());
  }
}

TEST(Lifecycle, ARequestWithoutTokensWritesNothingAndReadsZeros) {
  Request request("kvarn_k4v2_g128", 64, 2, 6, 10);
  const std::vector<uint8_t> before = request.memory;
  const int32_t length = 0, starts[2] = {0, 3};
  const kvarn_batch batch{1, 1, 1, request.table.data(), &length, starts};
  const auto kv = rows(request.k.data(), KVARN_FLOAT32, 3, 2, 64);
  ASSERT_TRUE(append(request.layout, request.pages, batch, kv, kv, request.workspace));
  const auto out = rows_out(request.out.data(), KVARN_FLOAT32, 3, 6, 64);
  ASSERT_TRUE(attend(request.layout, request.pages, batch, rows(request.q.data(), KVARN_FLOAT32, 3, 6, 64), out, {},
                     request.workspace));
  EXPECT_EQ(request.memory, before);
  for (int i = 0; i < 3 * 6 * 64; ++i) EXPECT_EQ(request.out[static_cast<size_t>(i)], 0.0f);
}

TEST(Lifecycle, NonFiniteTokensAreReplacedAndCounted) {
  Request request("kvarn_k4v2_g128", 64, 1, 1, 256);
  request.k[5] = std::nanf("");
  request.v[70] = INFINITY;
  request.v[71] = -1e6f;
  const int32_t length = 256, starts[2] = {0, 256};
  const kvarn_batch batch{1, static_cast<int32_t>(request.table.size()), 0, request.table.data(), &length, starts};
  int64_t replaced = 0;
  ASSERT_TRUE(append(request.layout, request.pages, batch, rows(request.k.data(), KVARN_FLOAT32, 256, 1, 64),
                     rows(request.v.data(), KVARN_FLOAT32, 256, 1, 64), request.workspace, KVARN_WEIGHTED, nullptr,
                     &replaced));
  EXPECT_EQ(replaced, 3);
  request.length = 256;
  for (float x : request.expanded()) ASSERT_TRUE(std::isfinite(x));
}

}  // namespace
}  // namespace kvarn::test
