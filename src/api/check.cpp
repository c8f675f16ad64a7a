// SPDX-License-Identifier: Apache-2.0
#include "api/check.hpp"

#include <bit>
#include <cstring>

#include "api/error.hpp"
#include "format/layout.hpp"

namespace kvarn {
namespace {

bool aligned(const void* pointer, uintptr_t to) { return reinterpret_cast<uintptr_t>(pointer) % to == 0; }
long long wide(int64_t value) { return value; }
// Positive and normal: dividing by it is exact.
bool is_power_of_two(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x807fffffu) == 0 && bits >= 0x00800000u && bits < 0x7f800000u;
}

}  // namespace

kvarn_status check_layout(const kvarn_layout* layout) {
  if (layout == nullptr) return fail(KVARN_NULL_POINTER, "layout is null; fill one with kvarn_layout_init");
  const format::Preset preset{layout->k_bits, layout->v_bits, layout->page_tokens};
  const bool known = format::contains(format::kBits, preset.k_bits) && format::contains(format::kBits, preset.v_bits) &&
                     format::contains(format::kPageTokens, preset.page_tokens) &&
                     format::contains(format::kHeadDims, layout->head_dim) && layout->kv_heads >= 1 &&
                     layout->kv_heads <= 1024;
  const kvarn_layout expected =
      known ? format::make_layout(preset, layout->head_dim, layout->kv_heads) : kvarn_layout{};
  if (!known || std::memcmp(layout, &expected, sizeof expected) != 0)
    return fail(KVARN_BAD_LAYOUT,
                "the layout (format version %d, this library has %d) was not made by kvarn_layout_init",
                layout->format_version, KVARN_FORMAT_VERSION);
  return KVARN_OK;
}

kvarn_status check_pages(const kvarn_layout& layout, const kvarn_pages* pages) {
  if (pages == nullptr || (pages->data == nullptr && pages->count != 0))
    return fail(KVARN_NULL_POINTER, "pages is null");
  if (pages->count < 0 || pages->count > INT32_MAX)
    return fail(KVARN_BAD_SHAPE, "pages has %lld pages; allowed: 0 to 2^31-1", wide(pages->count));
  if (!aligned(pages->data, 16) || pages->stride % 16 != 0)
    return fail(KVARN_MISALIGNED, "pages at %p with a stride of %lld bytes; both must be multiples of 16",
                static_cast<void*>(pages->data), wide(pages->stride));
  if (pages->count > 1 && pages->stride < layout.page_bytes)
    return fail(KVARN_BAD_STRIDE, "pages lie %lld bytes apart; a page of this layout has %lld", wide(pages->stride),
                wide(layout.page_bytes));
  return KVARN_OK;
}

kvarn_status check_batch(const kvarn_layout& layout, const kvarn_batch* batch, bool with_queries) {
  if (batch == nullptr) return fail(KVARN_NULL_POINTER, "batch is null");
  if (batch->requests < 0 || batch->table_width < 0)
    return fail(KVARN_BAD_SHAPE, "%d requests and a block table of width %d; neither may be negative", batch->requests,
                batch->table_width);
  if (batch->requests > 1 && batch->table_stride < batch->table_width)
    return fail(KVARN_BAD_STRIDE, "block table rows lie %lld entries apart and are %d wide", wide(batch->table_stride),
                batch->table_width);
  if (batch->requests > 0 && (batch->seq_lens == nullptr || (batch->block_table == nullptr && batch->table_width > 0)))
    return fail(KVARN_NULL_POINTER, "block_table or seq_lens is null");
  if (with_queries && batch->query_starts == nullptr) return fail(KVARN_NULL_POINTER, "query_starts is null");
  if (!aligned(batch->block_table, 4) || !aligned(batch->seq_lens, 4) ||
      (with_queries && !aligned(batch->query_starts, 4)))
    return fail(KVARN_MISALIGNED, "block_table, seq_lens and query_starts must be aligned to their int32 elements");
  if (with_queries && batch->query_starts[0] != 0)
    return fail(KVARN_BAD_LENGTH, "query_starts begins with %d; it must begin with 0", batch->query_starts[0]);

  for (int32_t r = 0; r < batch->requests; ++r) {
    const int64_t length = batch->seq_lens[r];
    if (length < 0) return fail(KVARN_BAD_LENGTH, "seq_lens[%d] is %lld; it must not be negative", r, wide(length));
    if (with_queries) {
      const int64_t queries = int64_t{batch->query_starts[r + 1]} - batch->query_starts[r];
      if (queries < 0)
        return fail(KVARN_BAD_LENGTH, "query_starts falls from %d to %d at request %d", batch->query_starts[r],
                    batch->query_starts[r + 1], r);
      if (length > 0 && queries > length)
        return fail(KVARN_BAD_LENGTH,
                    "request %d has %lld new tokens but seq_lens says %lld in all; seq_lens count this step's tokens",
                    r, wide(queries), wide(length));
    }
    const int64_t need = length == 0    ? 0
                         : with_queries ? format::pages_of(layout, length)
                                        : length / layout.page_tokens;
    if (need > batch->table_width)
      return fail(
          KVARN_BAD_SHAPE,
          "request %d of %lld tokens needs %lld block table entries (%d pages ahead included); the table has %d", r,
          wide(length), wide(need), with_queries ? layout.pages_ahead : 0, batch->table_width);
  }
  return KVARN_OK;
}

kvarn_status bad_entry(const kvarn_pages& pages, int32_t request, int64_t index, int32_t value) {
  return fail(KVARN_BAD_PAGE_INDEX, "block_table[%d][%lld] is %d; the pool has pages 0 to %lld", request, wide(index),
              value, wide(pages.count - 1));
}

kvarn_status check_rows(const char* what, const void* data, kvarn_dtype dtype, int64_t tokens, int64_t heads,
                        int64_t token_stride, int64_t head_stride, int64_t want_tokens, int64_t want_heads,
                        int32_t head_dim) {
  if (dtype != KVARN_FLOAT32 && dtype != KVARN_FLOAT16 && dtype != KVARN_BFLOAT16)
    return fail(KVARN_BAD_DTYPE, "%s has dtype code %d; allowed: float32, float16, bfloat16", what,
                static_cast<int>(dtype));
  if (data == nullptr && want_tokens > 0) return fail(KVARN_NULL_POINTER, "%s is null", what);
  if (tokens != want_tokens || (want_heads >= 0 && heads != want_heads))
    return fail(KVARN_BAD_SHAPE, "%s is [%lld, %lld, %d]; this step needs [%lld, %lld, %d]", what, wide(tokens),
                wide(heads), head_dim, wide(want_tokens), wide(want_heads >= 0 ? want_heads : heads), head_dim);
  if (!aligned(data, static_cast<uintptr_t>(element_bytes(dtype))))
    return fail(KVARN_MISALIGNED, "%s is not aligned to its elements", what);
  constexpr int64_t kMost = int64_t{1} << 40;
  if (token_stride < -kMost || token_stride > kMost || head_stride < -kMost || head_stride > kMost)
    return fail(KVARN_BAD_STRIDE, "%s has strides %lld, %lld; allowed: up to 2^40 elements", what, wide(token_stride),
                wide(head_stride));
  return KVARN_OK;
}

kvarn_status check_encoder(kvarn_encoder encoder, const float* feedback, uintptr_t alignment) {
  if (encoder != KVARN_WEIGHTED && encoder != KVARN_VARNORM)
    return fail(KVARN_BAD_ARGUMENT, "encoder code %d is unknown; allowed: KVARN_WEIGHTED, KVARN_VARNORM",
                static_cast<int>(encoder));
  if (feedback != nullptr && encoder != KVARN_WEIGHTED)
    return fail(KVARN_BAD_ARGUMENT, "the encoder varnorm takes no feedback; use weighted, or feedback NULL");
  if (!aligned(feedback, alignment))
    return fail(KVARN_MISALIGNED, "feedback is at %p; it must be aligned to %d bytes",
                static_cast<const void*>(feedback), static_cast<int>(alignment));
  return KVARN_OK;
}

kvarn_status check_balance(const kvarn_layout& layout, const float* balance) {
  if (!aligned(balance, alignof(float)))
    return fail(KVARN_MISALIGNED, "balance is at %p; it must be aligned to its float elements",
                static_cast<const void*>(balance));
  for (int32_t i = 0; balance != nullptr && i < layout.kv_heads * layout.head_dim; ++i)
    if (!is_power_of_two(balance[i]))
      return fail(KVARN_BAD_ARGUMENT, "balance[%d][%d] is %g; allowed: powers of two, 2^-126 to 2^127",
                  i / layout.head_dim, i % layout.head_dim, static_cast<double>(balance[i]));
  return KVARN_OK;
}

kvarn_status check_workspace(const kvarn_workspace* workspace, int64_t bytes) {
  if (workspace == nullptr || workspace->data == nullptr)
    return fail(KVARN_NULL_POINTER, "workspace is null; this step needs %lld bytes (kvarn_workspace_bytes)",
                wide(bytes));
  if (!aligned(workspace->data, 64))
    return fail(KVARN_MISALIGNED, "workspace at %p is not 64-byte aligned", workspace->data);
  if (workspace->bytes < bytes)
    return fail(KVARN_WORKSPACE_TOO_SMALL, "the workspace has %lld bytes; this step needs %lld (kvarn_workspace_bytes)",
                wide(workspace->bytes), wide(bytes));
  return KVARN_OK;
}

}  // namespace kvarn
