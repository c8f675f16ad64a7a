// SPDX-License-Identifier: Apache-2.0
// Every target against the scalar reference: append and expand bit for bit, attend within its rounding.
#include <gtest/gtest.h>

#include "support/cache.hpp"

namespace kvarn::test {
namespace {

// A folded operand is rounded to 1 / 16,256 of its largest element: uniform error of deviation .29 / 16,256 relative to
// the maximum, which is at most 4.5 deviations of the 64 .. 256 elements, so 8e-5 of their norm, once for q and once
// for p, and the scores enter exponentially with magnitude of about 1. Sums in binary32 add less than 1e-5. 4e-4 is
// three times that.
constexpr double kAttendTolerance = 4e-4;

class Agreement : public testing::TestWithParam<std::tuple<std::string, int, std::string>> {};

TEST_P(Agreement, WithTheReference) {
  const auto& [preset, head_dim, target] = GetParam();
  for (kvarn_encoder encoder : {KVARN_WEIGHTED, KVARN_VARNORM}) {
    Request reference(preset, head_dim, 2, 6, 300), other(preset, head_dim, 2, 6, 300);
    reference.options.target = "scalar";
    other.options.target = target.c_str();
    for (int32_t chunk : {1, 130, 5, 64, 100}) {
      reference.step(chunk, encoder);
      other.step(chunk, encoder);
    }
    EXPECT_EQ(reference.packed(), other.packed());
    EXPECT_EQ(reference.expanded(), other.expanded());
    EXPECT_LT(relative_error(other.out, reference.out), kAttendTolerance);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Agreement,
                         testing::Combine(testing::Values("kvarn_k4v2_g128", "kvarn_k4v3_g64", "kvarn_k2v2_g64",
                                                          "kvarn_k8v4_g128", "kvarn_k3v8_g64"),
                                          testing::Values(64, 80, 96, 128, 256), testing::ValuesIn(targets())),
                         [](const auto& test) {
                           return std::get<0>(test.param) + "_" + std::to_string(std::get<1>(test.param)) + "_" +
                                  std::get<2>(test.param);
                         });

TEST(Attend, IntegerSumsOfTheLargestOperandsDoNotOverflow) {
  // 8-bit codes of 255 against an operand of equal elements: 256 columns of 255 * 16,256.
  for (const std::string& target : targets()) {
    Request request("kvarn_k8v8_g128", 256, 1, 1, 129);
    request.options.target = target.c_str();
    std::fill(request.q.begin(), request.q.end(), 1.0f);
    request.step(129);
    for (float x : request.out) ASSERT_TRUE(std::isfinite(x));
  }
}

}  // namespace
}  // namespace kvarn::test
