// SPDX-License-Identifier: Apache-2.0
// Records are what they were when the format was fixed: tests/golden, made by the numpy reference.
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "support/cache.hpp"

namespace kvarn::test {
namespace {

uint64_t fnv1a64(const uint8_t* data, int64_t bytes) {
  uint64_t value = 0xcbf29ce484222325;
  for (int64_t i = 0; i < bytes; ++i) value = (value ^ data[i]) * 0x100000001b3;
  return value;
}

// The input that tests/golden/make.py describes.
void golden_input(std::vector<float>& x, uint32_t seed, int head_dim, int tokens, bool is_k) {
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < head_dim; ++d) {
      float value = hashed(static_cast<uint32_t>(t * head_dim + d), seed);
      if (is_k && d == 5) value = value * 8 + 24;
      if (t % 7 == 3) value *= 2;
      if (t == 0) value /= 16;
      x[static_cast<size_t>(t * head_dim + d)] = value;
    }
}

struct Case {
  std::string preset, encoder;
  int head_dim;
  uint64_t hash;
};

std::vector<Case> cases() {
  std::vector<Case> out;
  std::ifstream index(KVARN_GOLDEN "/index.txt");
  for (std::string line; std::getline(index, line);) {
    if (line.starts_with('#')) continue;
    Case c;
    std::istringstream(line) >> c.preset >> c.head_dim >> c.encoder >> std::hex >> c.hash;
    out.push_back(c);
  }
  return out;
}

class Golden : public testing::TestWithParam<std::string> {};

TEST_P(Golden, RecordsOfEveryPreset) {
  const std::vector<Case> all = cases();
  ASSERT_GE(all.size(), 100u);
  for (const Case& c : all) {
    Request request(c.preset, c.head_dim, 1, 1, c.preset.ends_with("_g64") ? 64 : 128);
    request.options.target = GetParam().c_str();
    const int tokens = request.layout.page_tokens;
    golden_input(request.k, 1, c.head_dim, tokens, true);
    golden_input(request.v, 2, c.head_dim, tokens, false);
    if (c.encoder == "feedback") request.feedback = hashed_feedback(static_cast<uint32_t>(c.head_dim));
    request.step(tokens, c.encoder == "varnorm" ? KVARN_VARNORM : KVARN_WEIGHTED);
    EXPECT_EQ(fnv1a64(request.page(0), request.layout.record_bytes), c.hash)
        << c.preset << " D " << c.head_dim << " " << c.encoder;
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, Golden, testing::ValuesIn(targets()), [](const auto& test) { return test.param; });

}  // namespace
}  // namespace kvarn::test
