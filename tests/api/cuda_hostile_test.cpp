// SPDX-License-Identifier: Apache-2.0
// Wrong arguments of kvarn/cuda.h are refused on the host, with or without a GPU, with or without CUDA in the build. No
// call here may reach a kernel: the memory is not a device's.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "kvarn/cuda.h"
#include "kvarn/kvarn.hpp"

namespace kvarn::test {
namespace {

alignas(256) uint8_t memory[1 << 16];

template <class T>
T* at(size_t offset) {
  return reinterpret_cast<T*>(memory + offset);
}

struct CudaHostile : testing::Test {
  kvarn_layout layout = make("kvarn_k4v2_g128", 128, 2);
  kvarn_pages pages{memory, 10, layout.page_bytes};
  kvarn_cuda_workspace workspace{memory, 1, {64, 8, 8, 4096, 132}};
  kvarn_cuda_step step{{4, 12, 12, at<int32_t>(0), at<int32_t>(256), at<int32_t>(512)}, nullptr, 16, 8, 0};
  kvarn_rows k = rows(memory, KVARN_FLOAT16, 16, 2, 128), v = k, q = rows(memory, KVARN_BFLOAT16, 16, 8, 128);
  kvarn_rows_out out = rows_out(memory, KVARN_BFLOAT16, 16, 8, 128);
  kvarn_rows_out k_out = rows_out(memory, KVARN_FLOAT16, 256, 2, 128), v_out = k_out;
  kvarn_cuda_attention attention{0.1f, 0, 0, nullptr, nullptr};
  kvarn_cuda_prefill prefill{0, 4, 4, 9, at<int32_t>(0), at<int32_t>(0), at<int32_t>(0), 2, at<int32_t>(0)};
  kvarn_cuda_layer layers[2] = {{pages, nullptr}, {pages, nullptr}};
  int32_t query_heads = 8, window = 0, count = 2;
  kvarn_encoder encoder = KVARN_WEIGHTED;
  int64_t* replaced = nullptr;
  const float *feedback = nullptr, *balance = nullptr;

  static kvarn_layout make(const char* preset, int32_t head_dim, int32_t kv_heads) {
    kvarn_layout made{};
    EXPECT_EQ(kvarn_layout_init(preset, head_dim, kv_heads, &made), KVARN_OK);
    return made;
  }

  kvarn_status plan() const { return kvarn_cuda_plan(&layout, &step, query_heads, window, &workspace, nullptr); }
  kvarn_status pack() const { return kvarn_cuda_pack(&layout, layers, count, &step, encoder, &workspace, nullptr); }
  kvarn_status append() const {
    return kvarn_cuda_append(&layout, &pages, &step, &k, &v, encoder, feedback, balance, replaced, &workspace, nullptr);
  }
  kvarn_status attend() const {
    return kvarn_cuda_attend(&layout, &pages, &step, &q, &out, &attention, &workspace, nullptr);
  }
  kvarn_status expand() const {
    return kvarn_cuda_expand(&layout, &pages, &step.batch, &k_out, &v_out, nullptr, nullptr);
  }
  kvarn_status prefill_pages() const {
    return kvarn_cuda_prefill_pages(&layout, &pages, &step, &prefill, &k_out, &v_out, &workspace, nullptr);
  }

  static void refused(kvarn_status got, kvarn_status expected, const char* mentions) {
    EXPECT_EQ(got, expected) << kvarn_last_error();
    EXPECT_NE(std::string(kvarn_last_error()).find(mentions), std::string::npos) << kvarn_last_error();
  }
  void step_refused(kvarn_status expected, const char* mentions) const {
    for (const kvarn_status got : {plan(), append(), pack(), attend(), prefill_pages()})
      refused(got, expected, mentions);
  }
};

// The last thing to be found out is that there is no device, or that one byte of workspace is too few.
TEST_F(CudaHostile, GoodArgumentsGetAsFarAsTheDevice) {
  for (const kvarn_status got : {plan(), append(), pack(), attend(), prefill_pages()})
    EXPECT_TRUE(got == KVARN_CUDA_UNAVAILABLE || got == KVARN_WORKSPACE_TOO_SMALL || got == KVARN_BAD_LAYOUT)
        << got << ": " << kvarn_last_error();
  EXPECT_TRUE(kvarn_cuda_available() != 0 || std::string(kvarn_last_error()) != "");
  EXPECT_STRNE(kvarn_status_message(KVARN_CUDA_ERROR), kvarn_status_message(KVARN_CUDA_UNAVAILABLE));
}

TEST_F(CudaHostile, NullPointers) {
  refused(kvarn_cuda_plan(nullptr, &step, 8, 0, &workspace, nullptr), KVARN_NULL_POINTER, "layout");
  refused(kvarn_cuda_plan(&layout, nullptr, 8, 0, &workspace, nullptr), KVARN_NULL_POINTER, "step");
  refused(kvarn_cuda_plan(&layout, &step, 8, 0, nullptr, nullptr), KVARN_NULL_POINTER, "workspace");
  refused(kvarn_cuda_append(&layout, nullptr, &step, &k, &v, encoder, nullptr, nullptr, nullptr, &workspace, nullptr),
          KVARN_NULL_POINTER, "pages");
  refused(
      kvarn_cuda_append(&layout, &pages, &step, nullptr, &v, encoder, nullptr, nullptr, nullptr, &workspace, nullptr),
      KVARN_NULL_POINTER, "k is null");
  refused(kvarn_cuda_pack(&layout, nullptr, 1, &step, encoder, &workspace, nullptr), KVARN_NULL_POINTER, "layers");
  refused(kvarn_cuda_attend(&layout, &pages, &step, &q, nullptr, &attention, &workspace, nullptr), KVARN_NULL_POINTER,
          "out is null");
  refused(kvarn_cuda_attend(&layout, &pages, &step, &q, &out, nullptr, &workspace, nullptr), KVARN_NULL_POINTER,
          "attention");
  refused(kvarn_cuda_expand(&layout, &pages, nullptr, &k_out, &v_out, nullptr, nullptr), KVARN_NULL_POINTER, "batch");
  refused(kvarn_cuda_rotate(128, nullptr, &out, nullptr), KVARN_NULL_POINTER, "in");
  refused(kvarn_cuda_prefill_pages(&layout, &pages, &step, nullptr, &k_out, &v_out, &workspace, nullptr),
          KVARN_NULL_POINTER, "prefill");
  refused(kvarn_cuda_workspace_bytes(&layout, nullptr, nullptr), KVARN_NULL_POINTER, "limits");
  step.batch.query_starts = nullptr;
  step_refused(KVARN_NULL_POINTER, "query_starts");
  step.batch.query_starts = at<int32_t>(0);
  step.batch.seq_lens = nullptr;
  step_refused(KVARN_NULL_POINTER, "seq_lens");
  refused(expand(), KVARN_NULL_POINTER, "seq_lens");
  workspace.data = nullptr;
  step_refused(KVARN_NULL_POINTER, "kvarn_cuda_workspace_bytes");
}

TEST_F(CudaHostile, LayoutsWithoutKernels) {
  layout = make("kvarn_k3v2_g128", 128, 2);
  step_refused(KVARN_BAD_LAYOUT, "k3v2_g128");
  refused(expand(), KVARN_BAD_LAYOUT, "allowed");
  layout = make("kvarn_k4v2_g128", 80, 2);
  step_refused(KVARN_BAD_LAYOUT, "head_dim 80");
  layout.page_bytes += 16;
  step_refused(KVARN_BAD_LAYOUT, "kvarn_layout_init");
  k_out.data = memory;
  const kvarn_rows in = rows(memory, KVARN_FLOAT16, 1, 1, 80);
  refused(kvarn_cuda_rotate(80, &in, &k_out, nullptr), KVARN_UNSUPPORTED_HEAD_DIM, "80");
}

TEST_F(CudaHostile, LimitsOfTheWorkspace) {
  int64_t bytes = 0;
  for (const kvarn_cuda_limits limits : {kvarn_cuda_limits{-1, 1, 8, 100, 1},
                                         {1, -1, 8, 100, 1},
                                         {1, 1, 8, -1, 1},
                                         {1, 1, 8, 100, -1},
                                         {1, 1, 8, 100, 1024},
                                         {INT32_MAX, 1, 8, 100, 1},
                                         {1, 1, 8, INT32_MAX, 1}}) {
    refused(kvarn_cuda_workspace_bytes(&layout, &limits, &bytes), KVARN_BAD_ARGUMENT, "allowed");
    workspace.limits = limits;
    step_refused(KVARN_BAD_ARGUMENT, "allowed");
  }
  for (const int32_t heads : {-2, 1, 3, 34, 64}) {
    const kvarn_cuda_limits limits{1, 1, heads, 100, 1};
    refused(kvarn_cuda_workspace_bytes(&layout, &limits, &bytes), KVARN_BAD_SHAPE, "query heads");
  }
  EXPECT_EQ(bytes, 0);
}

TEST_F(CudaHostile, StepsBeyondTheLimits) {
  step.tokens = 65;
  step_refused(KVARN_BAD_SHAPE, "at most 64");
  step.tokens = -1;
  step_refused(KVARN_BAD_SHAPE, "-1");
  step.tokens = 16;
  step.batch.requests = 9;
  step_refused(KVARN_BAD_SHAPE, "at most 8");
  step.batch.requests = -1;
  step_refused(KVARN_BAD_SHAPE, "-1");
  step.batch.requests = 4;
  for (const int32_t length : {0, -5}) {
    step.max_query_len = length;
    step_refused(KVARN_BAD_ARGUMENT, "max_query_len");
  }
  step.max_query_len = 1;
  step.batch.table_stride = 11;
  step_refused(KVARN_BAD_STRIDE, "11 entries");
  step.batch.table_stride = 12;
  step.batch.table_width = -1;
  step_refused(KVARN_BAD_SHAPE, "-1");
}

TEST_F(CudaHostile, Alignment) {
  step.slots = at<int64_t>(4);
  step_refused(KVARN_MISALIGNED, "slots");
  step.slots = nullptr;
  step.batch.block_table = at<int32_t>(2);
  step_refused(KVARN_MISALIGNED, "block_table");
  step.batch.block_table = at<int32_t>(0);
  workspace.data = memory + 128;
  step_refused(KVARN_MISALIGNED, "256-byte");
  workspace.data = memory;
  pages.data = memory + 8;
  refused(append(), KVARN_MISALIGNED, "multiples of 16");
  pages.data = memory;
  k.data = memory + 1;
  refused(append(), KVARN_MISALIGNED, "k is not aligned");
  replaced = at<int64_t>(4);
  k.data = memory;
  refused(append(), KVARN_MISALIGNED, "replaced");
  replaced = nullptr;
  balance = attention.balance = at<float>(8);
  refused(append(), KVARN_MISALIGNED, "balance");
  refused(attend(), KVARN_MISALIGNED, "balance");
  balance = attention.balance = nullptr;
  feedback = at<float>(4);
  refused(append(), KVARN_MISALIGNED, "16 bytes");
  feedback = at<float>(16);
  encoder = KVARN_VARNORM;
  refused(append(), KVARN_BAD_ARGUMENT, "feedback");
  attention.sinks = at<float>(1);
  refused(attend(), KVARN_MISALIGNED, "sinks");
}

TEST_F(CudaHostile, PagesAndRows) {
  pages.count = 0;
  refused(append(), KVARN_BAD_SHAPE, "no page");
  pages.count = 10;
  pages.stride = 16;
  refused(attend(), KVARN_BAD_STRIDE, "16 bytes apart");
  refused(expand(), KVARN_BAD_STRIDE, "16 bytes apart");
  pages.stride = layout.page_bytes;
  k.tokens = 15;
  refused(append(), KVARN_BAD_SHAPE, "[15, 2, 128]");
  k.tokens = 16;
  v.heads = 3;
  refused(append(), KVARN_BAD_SHAPE, "[16, 3, 128]");
  v.heads = 2;
  v.dtype = static_cast<kvarn_dtype>(9);
  refused(append(), KVARN_BAD_DTYPE, "9");
  v.dtype = KVARN_FLOAT32;
  v.token_stride = INT64_MIN;
  refused(append(), KVARN_BAD_STRIDE, "2^40");
  encoder = static_cast<kvarn_encoder>(7);
  v.token_stride = 256;
  refused(append(), KVARN_BAD_ARGUMENT, "encoder");
  v_out.tokens = 128;
  refused(expand(), KVARN_BAD_SHAPE, "[128, 2, 128]");
  k_out.heads = 1;
  refused(expand(), KVARN_BAD_SHAPE, "[256, 1, 128]");
}

TEST_F(CudaHostile, AttentionsArguments) {
  for (const int32_t heads : {1, 3, 34}) {
    q.heads = out.heads = query_heads = heads;
    refused(attend(), KVARN_BAD_SHAPE, "query heads");
    refused(plan(), KVARN_BAD_SHAPE, "query heads");
  }
  q.heads = out.heads = query_heads = 16;
  refused(attend(), KVARN_BAD_SHAPE, "at most 8");
  refused(plan(), KVARN_BAD_SHAPE, "at most 8");
  q.heads = 8;
  refused(attend(), KVARN_BAD_SHAPE, "out is");
  out.heads = query_heads = 8;
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    attention.scale = bad;
    refused(attend(), KVARN_BAD_ARGUMENT, "scale");
  }
  attention.scale = 1;
  for (const float bad : {NAN, INFINITY, -1.0f}) {
    attention.soft_cap = bad;
    refused(attend(), KVARN_BAD_ARGUMENT, "soft_cap");
  }
  attention.soft_cap = 0;
  attention.window = window = -1;
  refused(attend(), KVARN_BAD_ARGUMENT, "window");
  refused(plan(), KVARN_BAD_ARGUMENT, "window");
}

TEST_F(CudaHostile, PacksArguments) {
  step.defer = 2;
  step_refused(KVARN_BAD_ARGUMENT, "defer is 2");
  step.defer = 1;
  for (const int32_t bad : {-1, 513}) {
    count = bad;
    refused(pack(), KVARN_BAD_ARGUMENT, "0 to 512");
  }
  count = 2;
  layers[1].feedback = at<float>(4);
  refused(pack(), KVARN_MISALIGNED, "16 bytes");
  layers[1].feedback = at<float>(16);
  encoder = KVARN_VARNORM;
  refused(pack(), KVARN_BAD_ARGUMENT, "feedback");
  encoder = static_cast<kvarn_encoder>(7);
  refused(pack(), KVARN_BAD_ARGUMENT, "encoder");
  encoder = KVARN_WEIGHTED;
  layers[1].pages.count = 0;
  refused(pack(), KVARN_BAD_SHAPE, "no page");
  layers[1].pages = {nullptr, 10, layout.page_bytes};
  refused(pack(), KVARN_NULL_POINTER, "pages");
}

TEST_F(CudaHostile, PrefillsArguments) {
  prefill.sequences = 7;
  refused(prefill_pages(), KVARN_BAD_SHAPE, "needs 8 sequences");
  prefill.sequences = 8;
  prefill.first_request = 5;
  refused(prefill_pages(), KVARN_BAD_ARGUMENT, "first_request");
  prefill.first_request = 4, prefill.end_request = 5;
  refused(prefill_pages(), KVARN_BAD_ARGUMENT, "end_request");
  prefill.end_request = 3;
  refused(prefill_pages(), KVARN_BAD_ARGUMENT, "end_request");
  prefill.end_request = 4;
  prefill.pages = 3;
  refused(prefill_pages(), KVARN_BAD_SHAPE, "[384, 2, 128]");
  prefill.pages = 2;
  v_out.dtype = KVARN_FLOAT32;
  refused(prefill_pages(), KVARN_BAD_DTYPE, "float16 or bfloat16");
  prefill.overflow = nullptr;
  refused(prefill_pages(), KVARN_NULL_POINTER, "outputs");
}

TEST_F(CudaHostile, ShapesAndArchitecturesAreNamed) {
  const bool built = std::string(kvarn_cuda_architectures()) != "";
  EXPECT_EQ(kvarn_cuda_shapes()[0] != nullptr, built);
}

}  // namespace
}  // namespace kvarn::test
