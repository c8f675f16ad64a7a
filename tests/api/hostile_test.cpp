// SPDX-License-Identifier: Apache-2.0
// Wrong arguments get their status, a message that names the value, and leave every byte as it was.
#include <gtest/gtest.h>

#include "support/cache.hpp"

namespace kvarn::test {
namespace {

struct Hostile : testing::Test {
  Request r{"kvarn_k4v2_g128", 64, 2, 4, 300};
  int32_t length = 200, starts[2] = {0, 200};
  kvarn_batch batch{
      1, static_cast<int32_t>(r.table.size()), static_cast<int64_t>(r.table.size()), r.table.data(), &length, starts};
  kvarn_rows k = rows(r.k.data(), KVARN_FLOAT32, 200, 2, 64), q = rows(r.q.data(), KVARN_FLOAT32, 200, 4, 64);
  kvarn_rows_out out = rows_out(r.out.data(), KVARN_FLOAT32, 200, 4, 64);
  kvarn_workspace workspace = r.workspace;
  std::vector<uint8_t> before = r.memory;

  void expect_append(kvarn_status expected, const char* mentions) {
    const kvarn_status got = kvarn_append(&r.layout, &r.pages, &batch, &k, &k, KVARN_WEIGHTED, nullptr, nullptr,
                                          &workspace, nullptr, nullptr);
    EXPECT_EQ(got, expected) << kvarn_last_error();
    EXPECT_NE(std::string(kvarn_last_error()).find(mentions), std::string::npos) << kvarn_last_error();
    EXPECT_EQ(r.memory, before);
  }
  void expect_attend(kvarn_status expected, float scale = 1, float cap = 0) {
    EXPECT_EQ(kvarn_attend(&r.layout, &r.pages, &batch, &q, &out, scale, cap, nullptr, &workspace, nullptr), expected)
        << kvarn_last_error();
  }
};

TEST_F(Hostile, NullPointers) {
  EXPECT_EQ(
      kvarn_append(nullptr, &r.pages, &batch, &k, &k, KVARN_WEIGHTED, nullptr, nullptr, &workspace, nullptr, nullptr),
      KVARN_NULL_POINTER);
  EXPECT_EQ(
      kvarn_append(&r.layout, nullptr, &batch, &k, &k, KVARN_WEIGHTED, nullptr, nullptr, &workspace, nullptr, nullptr),
      KVARN_NULL_POINTER);
  EXPECT_EQ(kvarn_append(&r.layout, &r.pages, nullptr, &k, &k, KVARN_WEIGHTED, nullptr, nullptr, &workspace, nullptr,
                         nullptr),
            KVARN_NULL_POINTER);
  EXPECT_EQ(kvarn_append(&r.layout, &r.pages, &batch, nullptr, &k, KVARN_WEIGHTED, nullptr, nullptr, &workspace,
                         nullptr, nullptr),
            KVARN_NULL_POINTER);
  EXPECT_EQ(
      kvarn_append(&r.layout, &r.pages, &batch, &k, &k, KVARN_WEIGHTED, nullptr, nullptr, nullptr, nullptr, nullptr),
      KVARN_NULL_POINTER);
  EXPECT_EQ(kvarn_attend(&r.layout, &r.pages, &batch, &q, nullptr, 1, 0, nullptr, &workspace, nullptr),
            KVARN_NULL_POINTER);
  EXPECT_EQ(kvarn_expand(&r.layout, &r.pages, &batch, nullptr, &out, &workspace, nullptr), KVARN_NULL_POINTER);
  EXPECT_EQ(kvarn_layout_init(nullptr, 64, 1, &r.layout), KVARN_NULL_POINTER);
  EXPECT_EQ(kvarn_rotate(64, nullptr, &out, nullptr), KVARN_NULL_POINTER);
  EXPECT_EQ(kvarn_workspace_bytes(&r.layout, 1, 1, 1, 1, 1, nullptr), KVARN_NULL_POINTER);
  batch.query_starts = nullptr;
  expect_append(KVARN_NULL_POINTER, "query_starts");
}

TEST_F(Hostile, ShapesDtypesAndStrides) {
  k.tokens = 199;
  expect_append(KVARN_BAD_SHAPE, "[199, 2, 64]");
  k.tokens = 200;
  k.heads = 3;
  expect_append(KVARN_BAD_SHAPE, "[200, 3, 64]");
  k.heads = 2;
  k.dtype = static_cast<kvarn_dtype>(9);
  expect_append(KVARN_BAD_DTYPE, "9");
  k.dtype = KVARN_FLOAT32;
  k.token_stride = INT64_MAX;
  expect_append(KVARN_BAD_STRIDE, "strides");
  k.token_stride = 128;
  k.data = reinterpret_cast<const uint8_t*>(k.data) + 1;
  expect_append(KVARN_MISALIGNED, "aligned");
}

TEST_F(Hostile, PagesAndBlockTable) {
  r.pages.data += 8;
  expect_append(KVARN_MISALIGNED, "multiples of 16");
  r.pages.data -= 8;
  r.pages.stride = 16;
  expect_append(KVARN_BAD_STRIDE, "16 bytes apart");
  r.pages.stride = r.layout.page_bytes;
  for (int32_t bad : {-1, static_cast<int32_t>(r.pages.count), INT32_MIN, INT32_MAX}) {
    const int32_t keep = r.table[2];
    r.table[2] = bad;
    expect_append(KVARN_BAD_PAGE_INDEX, std::to_string(bad).c_str());
    r.table[2] = keep;
  }
  batch.table_width = 4;
  expect_append(KVARN_BAD_SHAPE, "pages ahead");
}

TEST_F(Hostile, LengthsAndQueryStarts) {
  length = -5;
  expect_append(KVARN_BAD_LENGTH, "-5");
  length = 199;
  expect_append(KVARN_BAD_LENGTH, "200 new tokens");
  length = INT32_MAX;
  expect_append(KVARN_BAD_SHAPE, "2147483647");
  length = 200;
  starts[0] = 1;
  expect_append(KVARN_BAD_LENGTH, "begins with 1");
  starts[0] = 0;
  starts[1] = -1;
  expect_append(KVARN_BAD_LENGTH, "falls");
}

TEST_F(Hostile, Feedback) {
  const std::vector<float> matrices(2 * 64 * 64 + 1);
  const auto give = [&](const float* feedback, kvarn_encoder encoder) {
    return kvarn_append(&r.layout, &r.pages, &batch, &k, &k, encoder, feedback, nullptr, &workspace, nullptr, nullptr);
  };
  EXPECT_EQ(give(matrices.data(), KVARN_VARNORM), KVARN_BAD_ARGUMENT);
  EXPECT_NE(std::string(kvarn_last_error()).find("no feedback"), std::string::npos);
  const auto* odd = reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(matrices.data()) + 2);
  EXPECT_EQ(give(odd, KVARN_WEIGHTED), KVARN_MISALIGNED);
  EXPECT_EQ(give(matrices.data(), KVARN_WEIGHTED), KVARN_OK);
}

TEST_F(Hostile, Balance) {
  std::vector<float> factors(2 * 64, 0.25f);
  factors[3] = 0x1p-126f, factors[70] = 0x1p127f;
  const auto give = [&](const float* balance) {
    const kvarn_status got = kvarn_append(&r.layout, &r.pages, &batch, &k, &k, KVARN_WEIGHTED, nullptr, balance,
                                          &workspace, nullptr, nullptr);
    EXPECT_EQ(kvarn_attend(&r.layout, &r.pages, &batch, &q, &out, 1, 0, balance, &workspace, nullptr), got);
    return got;
  };
  EXPECT_EQ(give(factors.data()), KVARN_OK);
  const auto* odd = reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(factors.data()) + 2);
  EXPECT_EQ(give(odd), KVARN_MISALIGNED);
  for (const float wrong : {0.0f, -1.0f, 3.0f, 0x1p-127f, HUGE_VALF, NAN}) {
    factors[70] = wrong;
    EXPECT_EQ(give(factors.data()), KVARN_BAD_ARGUMENT) << wrong;
    EXPECT_NE(std::string(kvarn_last_error()).find("balance[1][6] is"), std::string::npos) << kvarn_last_error();
  }
}

TEST_F(Hostile, Workspace) {
  workspace.bytes = 100;
  expect_append(KVARN_WORKSPACE_TOO_SMALL, "100 bytes");
  workspace = r.workspace;
  workspace.data = static_cast<uint8_t*>(workspace.data) + 16;
  expect_append(KVARN_MISALIGNED, "64-byte");
}

TEST_F(Hostile, AttendRefusesAWorkspaceOfAnotherStep) {
  std::fill_n(static_cast<uint8_t*>(workspace.data), 64, uint8_t{0});
  expect_attend(KVARN_WORKSPACE_STALE);
  expect_append(KVARN_BAD_SHAPE, (k.heads = 1, "1, 64"));
  k.heads = 2;
  ASSERT_EQ(
      kvarn_append(&r.layout, &r.pages, &batch, &k, &k, KVARN_WEIGHTED, nullptr, nullptr, &workspace, nullptr, nullptr),
      KVARN_OK);
  expect_attend(KVARN_OK);
  kvarn_pages other_layer = r.pages;
  std::vector<uint8_t> copy(r.memory);
  other_layer.data = copy.data() + (64 - reinterpret_cast<uintptr_t>(copy.data()) % 64) % 64;
  EXPECT_EQ(kvarn_attend(&r.layout, &other_layer, &batch, &q, &out, 1, 0, nullptr, &workspace, nullptr),
            KVARN_WORKSPACE_STALE);
}

TEST_F(Hostile, AttendArguments) {
  ASSERT_EQ(
      kvarn_append(&r.layout, &r.pages, &batch, &k, &k, KVARN_WEIGHTED, nullptr, nullptr, &workspace, nullptr, nullptr),
      KVARN_OK);
  for (int64_t heads : {0, 1, 3, 2 * 65}) {
    q.heads = out.heads = heads;
    expect_attend(KVARN_BAD_SHAPE);
  }
  q.heads = out.heads = 4;
  expect_attend(KVARN_BAD_ARGUMENT, NAN);
  expect_attend(KVARN_BAD_ARGUMENT, 1, -1);
  expect_attend(KVARN_BAD_ARGUMENT, 1, INFINITY);
  expect_attend(KVARN_OK, 1e30f, 1e-30f);
}

TEST_F(Hostile, NamesAndLayouts) {
  Layout other = r.layout;
  EXPECT_EQ(kvarn_layout_init("kvarn_k9v2_g128", 64, 1, &other), KVARN_UNKNOWN_PRESET);
  EXPECT_EQ(kvarn_layout_init("kvarn_k4v2_g128", 65, 1, &other), KVARN_UNSUPPORTED_HEAD_DIM);
  EXPECT_EQ(kvarn_layout_init("kvarn_k4v2_g128", 64, 0, &other), KVARN_BAD_SHAPE);
  r.layout.record_bytes += 16;
  expect_append(KVARN_BAD_LAYOUT, "kvarn_layout_init");
  r.layout.record_bytes -= 16;
  const kvarn_options unknown{nullptr, "sse9"};
  EXPECT_EQ(kvarn_append(&r.layout, &r.pages, &batch, &k, &k, KVARN_WEIGHTED, nullptr, nullptr, &workspace, &unknown,
                         nullptr),
            KVARN_UNKNOWN_TARGET);
  EXPECT_EQ(kvarn_target("sse9"), nullptr);
  EXPECT_EQ(kvarn_append(&r.layout, &r.pages, &batch, &k, &k, static_cast<kvarn_encoder>(7), nullptr, nullptr,
                         &workspace, nullptr, nullptr),
            KVARN_BAD_ARGUMENT);
}

TEST_F(Hostile, EveryStatusHasAMessage) {
  for (int code = 0; code < 100; ++code) EXPECT_STRNE(kvarn_status_message(static_cast<kvarn_status>(code)), "");
}

TEST_F(Hostile, RandomPagesGiveResultsNotCrashes) {
  for (const char* preset : {"kvarn_k4v2_g128", "kvarn_k3v3_g64", "kvarn_k8v8_g64"})
    for (const std::string& target : targets()) {
      Request x(preset, 64, 1, 4, 300);
      x.options.target = target.c_str();
      x.step(299);
      for (size_t i = 0; i < x.memory.size(); ++i) x.memory[i] = static_cast<uint8_t>(mix(static_cast<uint32_t>(i)));
      x.step(1);
      x.expanded();
    }
}

}  // namespace
}  // namespace kvarn::test
