// SPDX-License-Identifier: Apache-2.0
#include "api/cuda_check.hpp"

#include <cmath>

#include "api/check.hpp"
#include "api/error.hpp"
#include "cuda/plan.hpp"
#include "cuda/shape.hpp"

namespace kvarn::cuda {
namespace {

constexpr int32_t kMostRows = 1 << 24;    // tokens and requests of a step
constexpr int32_t kMostLength = 1 << 30;  // so that positions and tile ends stay within int32
constexpr int32_t kMostCtas = 1023;       // the plan cuts the work with one CTA of 1,024 threads
constexpr int32_t kMostGroup = 16;        // query heads per KV head
constexpr int64_t kMostTable = 1 << 24;   // entries of a block table's row

long long wide(int64_t value) { return value; }
bool aligned(const void* pointer, uintptr_t to) { return reinterpret_cast<uintptr_t>(pointer) % to == 0; }

kvarn_status check_shape(const kvarn_layout* layout) {
  KVARN_TRY(check_layout(layout));
  if (!has_kernels(*layout))
    return fail(KVARN_BAD_LAYOUT,
                "k%dv%d_g%d with head_dim %d has no CUDA kernels; allowed: %seach _g128 or _g64, with head_dim%s",
                layout->k_bits, layout->v_bits, layout->page_tokens, layout->head_dim, kPresetNames, kHeadDimNames);
  return KVARN_OK;
}

kvarn_status check_heads(const kvarn_layout& layout, int64_t query_heads) {
  if (query_heads < layout.kv_heads || query_heads % layout.kv_heads != 0 || query_heads / layout.kv_heads > kMostGroup)
    return fail(KVARN_BAD_SHAPE, "%lld query heads over %d KV heads; allowed: a multiple of kv_heads, at most %d times",
                wide(query_heads), layout.kv_heads, kMostGroup);
  return KVARN_OK;
}

kvarn_status check_limits(const kvarn_layout& layout, const kvarn_cuda_limits& limits) {
  if (limits.tokens < 0 || limits.tokens > kMostRows || limits.requests < 0 || limits.requests > kMostRows)
    return fail(KVARN_BAD_ARGUMENT, "limits of %d tokens and %d requests; allowed: 0 to %d", limits.tokens,
                limits.requests, kMostRows);
  if (limits.max_seq_len < 0 || limits.max_seq_len > kMostLength)
    return fail(KVARN_BAD_ARGUMENT, "limits.max_seq_len is %d; allowed: 0 to %d", limits.max_seq_len, kMostLength);
  if (limits.ctas < 0 || limits.ctas > kMostCtas)
    return fail(KVARN_BAD_ARGUMENT, "limits.ctas is %d; allowed: 0 (one per multiprocessor) to %d", limits.ctas,
                kMostCtas);
  return limits.query_heads == 0 ? KVARN_OK : check_heads(layout, limits.query_heads);
}

kvarn_status check_memory(const kvarn_layout& layout, const kvarn_cuda_workspace* workspace) {
  if (workspace == nullptr || workspace->data == nullptr)
    return fail(KVARN_NULL_POINTER, "workspace is null; kvarn_cuda_workspace_bytes says how large it must be");
  if (!aligned(workspace->data, 256))
    return fail(KVARN_MISALIGNED, "workspace at %p is not 256-byte aligned", workspace->data);
  return check_limits(layout, workspace->limits);
}

kvarn_status check_tables(const kvarn_batch& batch) {
  if (batch.requests < 0 || batch.requests > kMostRows || batch.table_width < 0 || batch.table_width > kMostTable)
    return fail(KVARN_BAD_SHAPE, "%d requests and a block table of width %d; allowed: 0 to %d", batch.requests,
                batch.table_width, kMostRows);
  if (batch.requests > 1 && batch.table_stride < batch.table_width)
    return fail(KVARN_BAD_STRIDE, "block table rows lie %lld entries apart and are %d wide", wide(batch.table_stride),
                batch.table_width);
  if (batch.requests > 0 && (batch.seq_lens == nullptr || (batch.block_table == nullptr && batch.table_width > 0)))
    return fail(KVARN_NULL_POINTER, "block_table or seq_lens is null");
  if (!aligned(batch.block_table, 4) || !aligned(batch.seq_lens, 4) || !aligned(batch.query_starts, 4))
    return fail(KVARN_MISALIGNED, "block_table, seq_lens and query_starts must be aligned to their int32 elements");
  return KVARN_OK;
}

kvarn_status check_step(const kvarn_cuda_step* step, const kvarn_cuda_limits& limits) {
  if (step == nullptr) return fail(KVARN_NULL_POINTER, "step is null");
  KVARN_TRY(check_tables(step->batch));
  if (step->batch.query_starts == nullptr) return fail(KVARN_NULL_POINTER, "query_starts is null");
  if (step->batch.requests > limits.requests)
    return fail(KVARN_BAD_SHAPE, "the step has %d requests; the workspace was made for at most %d",
                step->batch.requests, limits.requests);
  if (step->tokens < 0 || step->tokens > limits.tokens)
    return fail(KVARN_BAD_SHAPE, "the step has %d tokens; the workspace was made for at most %d", step->tokens,
                limits.tokens);
  if (step->max_query_len < 1)
    return fail(KVARN_BAD_ARGUMENT, "max_query_len is %d; it must be at least 1", step->max_query_len);
  if (step->defer != 0 && step->defer != 1) return fail(KVARN_BAD_ARGUMENT, "defer is %d; allowed: 0, 1", step->defer);
  if (!aligned(step->slots, 8)) return fail(KVARN_MISALIGNED, "slots must be aligned to its int64 elements");
  return KVARN_OK;
}

// A page index is clamped into the pool, so there must be a page.
kvarn_status check_pool(const kvarn_layout& layout, const kvarn_pages* pages, const kvarn_batch& batch) {
  KVARN_TRY(check_pages(layout, pages));
  if (pages->count == 0 && batch.requests > 0) return fail(KVARN_BAD_SHAPE, "pages has no page");
  if (pages->stride < 0) return fail(KVARN_BAD_STRIDE, "pages lie %lld bytes apart", wide(pages->stride));
  return KVARN_OK;
}

kvarn_status check_balance(const float* balance) {
  if (!aligned(balance, 16))
    return fail(KVARN_MISALIGNED, "balance at %p is not 16-byte aligned", static_cast<const void*>(balance));
  return KVARN_OK;
}

kvarn_status check_window(int32_t window) {
  if (window < 0) return fail(KVARN_BAD_ARGUMENT, "window is %d; allowed: 0 (off) or more", window);
  return KVARN_OK;
}

}  // namespace

kvarn_status check_workspace_bytes(const kvarn_layout* layout, const kvarn_cuda_limits* limits, const int64_t* bytes) {
  KVARN_TRY(check_shape(layout));
  if (limits == nullptr || bytes == nullptr) return fail(KVARN_NULL_POINTER, "limits or bytes is null");
  return check_limits(*layout, *limits);
}

kvarn_status check_plan(const kvarn_layout* layout, const kvarn_cuda_step* step, int32_t query_heads, int32_t window,
                        const kvarn_cuda_workspace* workspace) {
  KVARN_TRY(check_shape(layout));
  KVARN_TRY(check_memory(*layout, workspace));
  KVARN_TRY(check_step(step, workspace->limits));
  if (query_heads != 0) KVARN_TRY(check_heads(*layout, query_heads));
  if (query_heads > workspace->limits.query_heads)
    return fail(KVARN_BAD_SHAPE, "%d query heads; the workspace was made for at most %d", query_heads,
                workspace->limits.query_heads);
  return check_window(window);
}

kvarn_status check_append(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_cuda_step* step,
                          const kvarn_rows* k, const kvarn_rows* v, kvarn_encoder encoder, const float* feedback,
                          const float* balance, const int64_t* replaced, const kvarn_cuda_workspace* workspace) {
  KVARN_TRY(check_shape(layout));
  KVARN_TRY(check_memory(*layout, workspace));
  KVARN_TRY(check_step(step, workspace->limits));
  KVARN_TRY(check_pool(*layout, pages, step->batch));
  KVARN_TRY(check_encoder(encoder, feedback, 16));
  KVARN_TRY(check_rows("k", k, step->tokens, layout->kv_heads, layout->head_dim));
  KVARN_TRY(check_rows("v", v, step->tokens, layout->kv_heads, layout->head_dim));
  KVARN_TRY(check_balance(balance));
  if (!aligned(replaced, 8)) return fail(KVARN_MISALIGNED, "replaced must be aligned to its int64 element");
  return KVARN_OK;
}

kvarn_status check_pack(const kvarn_layout* layout, const kvarn_cuda_layer* layers, int32_t count,
                        const kvarn_cuda_step* step, kvarn_encoder encoder, const kvarn_cuda_workspace* workspace) {
  KVARN_TRY(check_shape(layout));
  KVARN_TRY(check_memory(*layout, workspace));
  KVARN_TRY(check_step(step, workspace->limits));
  if (count < 0 || count > kMostLayers)
    return fail(KVARN_BAD_ARGUMENT, "pack of %d layers; allowed: 0 to %d a call", count, kMostLayers);
  if (count > 0 && layers == nullptr) return fail(KVARN_NULL_POINTER, "layers is null");
  KVARN_TRY(check_encoder(encoder, nullptr, 16));
  for (int32_t i = 0; i < count; ++i) {
    KVARN_TRY(check_pool(*layout, &layers[i].pages, step->batch));
    KVARN_TRY(check_encoder(encoder, layers[i].feedback, 16));
  }
  return KVARN_OK;
}

kvarn_status check_attend(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_cuda_step* step,
                          const kvarn_rows* q, const kvarn_rows_out* out, const kvarn_cuda_attention* attention,
                          const kvarn_cuda_workspace* workspace) {
  KVARN_TRY(check_shape(layout));
  KVARN_TRY(check_memory(*layout, workspace));
  KVARN_TRY(check_step(step, workspace->limits));
  KVARN_TRY(check_pool(*layout, pages, step->batch));
  KVARN_TRY(check_rows("q", q, step->tokens, -1, layout->head_dim));
  KVARN_TRY(check_rows("out", out, step->tokens, q->heads, layout->head_dim));
  KVARN_TRY(check_heads(*layout, q->heads));
  if (q->heads > workspace->limits.query_heads)
    return fail(KVARN_BAD_SHAPE, "q has %lld heads; the workspace was made for at most %d", wide(q->heads),
                workspace->limits.query_heads);
  if (attention == nullptr) return fail(KVARN_NULL_POINTER, "attention is null");
  if (!std::isfinite(attention->scale) || !std::isfinite(attention->soft_cap) || attention->soft_cap < 0)
    return fail(KVARN_BAD_ARGUMENT, "scale %g, soft_cap %g; allowed: a finite scale, a soft_cap of 0 (off) or more",
                static_cast<double>(attention->scale), static_cast<double>(attention->soft_cap));
  if (!aligned(attention->sinks, 4)) return fail(KVARN_MISALIGNED, "sinks must be aligned to its float elements");
  KVARN_TRY(check_balance(attention->balance));
  return check_window(attention->window);
}

kvarn_status check_expand(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                          const kvarn_rows_out* k, const kvarn_rows_out* v) {
  KVARN_TRY(check_shape(layout));
  if (batch == nullptr || k == nullptr || v == nullptr) return fail(KVARN_NULL_POINTER, "batch, k or v is null");
  KVARN_TRY(check_tables(*batch));
  KVARN_TRY(check_pool(*layout, pages, *batch));
  KVARN_TRY(check_rows("k", k, k->tokens, layout->kv_heads, layout->head_dim));
  KVARN_TRY(check_rows("v", v, k->tokens, layout->kv_heads, layout->head_dim));
  if (k->tokens < 0) return fail(KVARN_BAD_SHAPE, "k and v have %lld tokens", wide(k->tokens));
  return KVARN_OK;
}

kvarn_status check_rotate(int32_t head_dim, const kvarn_rows* in, const kvarn_rows_out* out) {
  if (head_dim != 64 && head_dim != 96 && head_dim != 128 && head_dim != 256)
    return fail(KVARN_UNSUPPORTED_HEAD_DIM, "head_dim %d has no CUDA kernels; allowed: 64, 96, 128, 256", head_dim);
  if (in == nullptr || out == nullptr) return fail(KVARN_NULL_POINTER, "in or out is null");
  KVARN_TRY(check_rows("in", in, in->tokens, -1, head_dim));
  KVARN_TRY(check_rows("out", out, in->tokens, in->heads, head_dim));
  if (in->tokens < 0 || in->heads < 0 || in->heads > INT32_MAX)
    return fail(KVARN_BAD_SHAPE, "in is [%lld, %lld, %d]", wide(in->tokens), wide(in->heads), head_dim);
  return KVARN_OK;
}

kvarn_status check_prefill_pages(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_cuda_step* step,
                                 const kvarn_cuda_prefill* prefill, const kvarn_rows_out* k, const kvarn_rows_out* v,
                                 const kvarn_cuda_workspace* workspace) {
  KVARN_TRY(check_shape(layout));
  KVARN_TRY(check_memory(*layout, workspace));
  KVARN_TRY(check_step(step, workspace->limits));
  KVARN_TRY(check_pool(*layout, pages, step->batch));
  if (prefill == nullptr || prefill->block_table == nullptr || prefill->seq_lens == nullptr ||
      prefill->query_starts == nullptr || prefill->overflow == nullptr)
    return fail(KVARN_NULL_POINTER, "prefill, or one of its four outputs, is null");
  if (!aligned(prefill->block_table, 4) || !aligned(prefill->seq_lens, 4) || !aligned(prefill->query_starts, 4) ||
      !aligned(prefill->overflow, 4))
    return fail(KVARN_MISALIGNED, "the outputs of prefill must be aligned to their int32 elements");
  if (prefill->first_request < 0 || prefill->end_request < prefill->first_request ||
      prefill->end_request > step->batch.requests)
    return fail(KVARN_BAD_ARGUMENT, "prefill has first_request %d and end_request %d; the step has %d requests",
                prefill->first_request, prefill->end_request, step->batch.requests);
  const int64_t sequences = most_tiles(*layout, step->tokens, step->batch.requests);
  if (prefill->table_width < 1 || prefill->pages < 0 || prefill->sequences < sequences)
    return fail(KVARN_BAD_SHAPE,
                "prefill has %d sequences, a table of width %d and %d pages; this step needs %lld sequences, a width "
                "of at least 1",
                prefill->sequences, prefill->table_width, prefill->pages, wide(sequences));
  const int64_t tokens = int64_t{prefill->pages} * layout->page_tokens;
  KVARN_TRY(check_rows("k", k, tokens, layout->kv_heads, layout->head_dim));
  KVARN_TRY(check_rows("v", v, tokens, layout->kv_heads, layout->head_dim));
  if (k->dtype == KVARN_FLOAT32 || v->dtype != k->dtype)
    return fail(KVARN_BAD_DTYPE, "the pages of a prefill are float16 or bfloat16, k and v alike");
  return KVARN_OK;
}

}  // namespace kvarn::cuda
