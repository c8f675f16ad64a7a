// SPDX-License-Identifier: Apache-2.0
// The C ABI: check, map the workspace, run.
#include "kvarn/kvarn.h"

#include <cmath>

#include "api/check.hpp"
#include "api/error.hpp"
#include "format/layout.hpp"
#include "pages/append.hpp"
#include "pages/attend.hpp"
#include "pages/expand.hpp"
#include "target/dispatch.hpp"

using namespace kvarn;

namespace {

const kvarn_executor* executor_of(const kvarn_options* options) {
  return options == nullptr ? nullptr : options->executor;
}
const char* target_of(const kvarn_options* options) { return options == nullptr ? nullptr : options->target; }

kvarn_status check_executor(const kvarn_executor* executor) {
  if (executor == nullptr) return KVARN_OK;
  if (executor->threads < 1 || executor->threads > 4096)
    return fail(KVARN_BAD_ARGUMENT, "the executor has %d threads; allowed: 1 to 4096", executor->threads);
  if (executor->threads > 1 && executor->run == nullptr) return fail(KVARN_NULL_POINTER, "executor->run is null");
  return KVARN_OK;
}

// Everything that append and attend have in common.
kvarn_status check_step(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                        const kvarn_options* options, const Kernels** kernels) {
  KVARN_TRY(check_layout(layout));
  KVARN_TRY(check_pages(*layout, pages));
  KVARN_TRY(check_batch(*layout, batch, true));
  KVARN_TRY(check_executor(executor_of(options)));
  return find_target(target_of(options), kernels);
}

// Does a prompt's row need a raw tile that is not in the pages?
bool needs_step_rows(const Step& step) {
  for (int32_t r = 0; r < step.batch.requests; ++r)
    if (step.queries(r) > 0 && !format::raw_in_pages(step.layout, step.tile_of(step.start(r)), step.length(r)))
      return true;
  return false;
}

}  // namespace

extern "C" const char* const* kvarn_presets(void) { return format::kDocumentedPresets.data(); }

extern "C" kvarn_status kvarn_layout_init(const char* preset, int32_t head_dim, int32_t kv_heads,
                                          kvarn_layout* layout) {
  if (preset == nullptr || layout == nullptr) return fail(KVARN_NULL_POINTER, "preset or layout is null");
  const auto parsed = format::parse_preset(preset);
  if (!parsed)
    return fail(
        KVARN_UNKNOWN_PRESET,
        "preset \"%.40s\" is unknown; allowed: kvarn_k{8,4,3,2}v{8,4,3,2}_g{128,64}, for example kvarn_k4v2_g128",
        preset);
  if (!format::contains(format::kHeadDims, head_dim))
    return fail(KVARN_UNSUPPORTED_HEAD_DIM, "head_dim %d is not supported; allowed: 64, 80, 96, 128, 256", head_dim);
  if (kv_heads < 1 || kv_heads > 1024) return fail(KVARN_BAD_SHAPE, "kv_heads is %d; allowed: 1 to 1024", kv_heads);
  *layout = format::make_layout(*parsed, head_dim, kv_heads);
  return KVARN_OK;
}

extern "C" kvarn_status kvarn_workspace_bytes(const kvarn_layout* layout, int64_t tokens, int64_t requests,
                                              int64_t query_heads, int64_t max_seq_len, int32_t threads,
                                              int64_t* bytes) {
  KVARN_TRY(check_layout(layout));
  if (bytes == nullptr) return fail(KVARN_NULL_POINTER, "bytes is null");
  constexpr int64_t kMost = INT32_MAX;
  if (tokens < 0 || tokens > kMost || requests < 0 || requests > kMost || query_heads < 0 || query_heads > 65536 ||
      max_seq_len < 0 || max_seq_len > kMost || threads < 1 || threads > 4096)
    return fail(
        KVARN_BAD_ARGUMENT,
        "tokens, requests, max_seq_len must lie in 0 .. 2^31-1, query_heads in 0 .. 65536, threads in 1 .. 4096");
  // Only a chunk of n + 2 tokens or more stages (specification section 8).
  const int64_t staging = std::min(requests, tokens / (layout->raw_tokens_per_page + 2));
  const int64_t raw_rows = tokens + staging * (layout->page_tokens - 1);
  const int64_t segments = max_seq_len / (int64_t{kSegmentTiles} * layout->page_tokens) + 1;
  const int64_t units = std::min<int64_t>(int64_t{kUnitsPerThread} * threads, tokens * layout->kv_heads);
  const int64_t part_columns = query_heads > 0 && threads > 1 && segments > 1 ? units * segments * kMaxColumns : 0;
  *bytes = WorkspaceMap::make(*layout, raw_rows, tokens, requests, threads, part_columns).bytes;
  return KVARN_OK;
}

extern "C" kvarn_status kvarn_append(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                                     const kvarn_rows* k, const kvarn_rows* v, kvarn_encoder encoder,
                                     const float* feedback, const float* balance, const kvarn_workspace* workspace,
                                     const kvarn_options* options, int64_t* replaced) {
  const Kernels* kernels;
  KVARN_TRY(check_step(layout, pages, batch, options, &kernels));
  KVARN_TRY(check_encoder(encoder, feedback, alignof(float)));
  KVARN_TRY(check_balance(*layout, balance));
  const Step step{*layout, *pages, *batch};
  KVARN_TRY(check_rows("k", k, step.tokens(), layout->kv_heads, layout->head_dim));
  KVARN_TRY(check_rows("v", v, step.tokens(), layout->kv_heads, layout->head_dim));
  KVARN_TRY(check_entries(
      *pages, *batch, [&](int32_t r) { return int64_t{step.first_pack(r)}; },
      [&](int32_t r) { return step.queries(r) > 0 ? format::pages_of(*layout, step.length(r)) : 0; }));

  const int32_t threads = thread_count(executor_of(options));
  const WorkspaceMap map =
      WorkspaceMap::make(*layout, step.tokens() + step.staged_tokens(), step.tokens(), batch->requests, threads, 0);
  KVARN_TRY(check_workspace(workspace, map.bytes));
  const Workspace space{static_cast<uint8_t*>(workspace->data), map, *layout};
  const int64_t count = append(step, space, *kernels, executor_of(options), *k, *v, encoder, feedback, balance);
  if (replaced != nullptr) *replaced = count;
  return KVARN_OK;
}

extern "C" kvarn_status kvarn_attend(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                                     const kvarn_rows* q, const kvarn_rows_out* out, float scale, float soft_cap,
                                     const float* balance, const kvarn_workspace* workspace,
                                     const kvarn_options* options) {
  const Kernels* kernels;
  KVARN_TRY(check_step(layout, pages, batch, options, &kernels));
  const Step step{*layout, *pages, *batch};
  KVARN_TRY(check_rows("q", q, step.tokens(), -1, layout->head_dim));
  KVARN_TRY(check_rows("out", out, step.tokens(), q->heads, layout->head_dim));
  if (q->heads < layout->kv_heads || q->heads % layout->kv_heads != 0 || q->heads / layout->kv_heads > kMaxColumns)
    return fail(KVARN_BAD_SHAPE,
                "%lld query heads over %d KV heads; allowed: a multiple of kv_heads, at most %d times as many",
                static_cast<long long>(q->heads), layout->kv_heads, kMaxColumns);
  if (!std::isfinite(scale) || !std::isfinite(soft_cap) || soft_cap < 0)
    return fail(KVARN_BAD_ARGUMENT, "scale %g, soft_cap %g; allowed: a finite scale, a soft_cap of 0 (off) or more",
                static_cast<double>(scale), static_cast<double>(soft_cap));
  KVARN_TRY(check_balance(*layout, balance));
  KVARN_TRY(check_entries(
      *pages, *batch, [](int32_t) { return int64_t{0}; },
      [&](int32_t r) { return step.queries(r) > 0 ? format::pages_of(*layout, step.length(r)) : 0; }));

  const int32_t threads = thread_count(executor_of(options));
  AttendPlan plan = plan_attend(step, q->heads, threads, nullptr);
  const WorkspaceMap map = WorkspaceMap::make(*layout, step.tokens() + step.staged_tokens(), step.tokens(),
                                              batch->requests, threads, plan.part_columns());
  KVARN_TRY(check_workspace(workspace, map.bytes));
  const Workspace space{static_cast<uint8_t*>(workspace->data), map, *layout};
  if (needs_step_rows(step) && (space.header().magic != kStepMagic || space.header().fingerprint != fingerprint(step)))
    return fail(KVARN_WORKSPACE_STALE,
                "rows of this prompt read raw tiles that only append's workspace holds; pass the workspace that "
                "kvarn_append of the same "
                "pages and batch filled last");
  plan = plan_attend(step, q->heads, threads, space.blocks());
  attend(step, space, plan, *kernels, executor_of(options), *q, *out, scale, soft_cap, balance);
  return KVARN_OK;
}

extern "C" kvarn_status kvarn_expand(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                                     const kvarn_rows_out* k, const kvarn_rows_out* v, const kvarn_workspace* workspace,
                                     const kvarn_options* options) {
  KVARN_TRY(check_layout(layout));
  KVARN_TRY(check_pages(*layout, pages));
  KVARN_TRY(check_batch(*layout, batch, false));
  KVARN_TRY(check_executor(executor_of(options)));
  const Kernels* kernels;
  KVARN_TRY(find_target(target_of(options), &kernels));
  int64_t tokens = 0;
  for (int32_t r = 0; r < batch->requests; ++r)
    tokens += batch->seq_lens[r] / layout->page_tokens * layout->page_tokens;
  KVARN_TRY(check_rows("k", k, tokens, layout->kv_heads, layout->head_dim));
  KVARN_TRY(check_rows("v", v, tokens, layout->kv_heads, layout->head_dim));
  KVARN_TRY(check_entries(
      *pages, *batch, [](int32_t) { return int64_t{0}; },
      [&](int32_t r) { return int64_t{batch->seq_lens[r] / layout->page_tokens}; }));
  KVARN_TRY(check_workspace(workspace, thread_count(executor_of(options)) * int64_t{sizeof(Scratch)}));
  expand(Step{*layout, *pages, *batch}, static_cast<Scratch*>(workspace->data), *kernels, executor_of(options), *k, *v);
  return KVARN_OK;
}

extern "C" kvarn_status kvarn_rotate(int32_t head_dim, const kvarn_rows* in, const kvarn_rows_out* out,
                                     const kvarn_options* options) {
  if (!format::contains(format::kHeadDims, head_dim))
    return fail(KVARN_UNSUPPORTED_HEAD_DIM, "head_dim %d is not supported; allowed: 64, 80, 96, 128, 256", head_dim);
  if (in == nullptr || out == nullptr) return fail(KVARN_NULL_POINTER, "in or out is null");
  KVARN_TRY(check_rows("in", in, in->tokens, -1, head_dim));
  KVARN_TRY(check_rows("out", out, in->tokens, in->heads, head_dim));
  KVARN_TRY(check_executor(executor_of(options)));
  const Kernels* kernels;
  KVARN_TRY(find_target(target_of(options), &kernels));
  parallel_for(executor_of(options), in->tokens, [&](int64_t t, int32_t) {
    for (int64_t h = 0; h < in->heads; ++h)
      kernels->rotate(row_at(*in, t, h), in->dtype, head_dim, row_at(*out, t, h), out->dtype);
  });
  return KVARN_OK;
}
