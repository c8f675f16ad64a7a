// SPDX-License-Identifier: Apache-2.0
// The edge: every argument is checked here, once, before anything is written.
#pragma once

#include "pages/step.hpp"

namespace kvarn {

#define KVARN_TRY(expression)                                  \
  do {                                                         \
    const kvarn_status kvarn_try_status = (expression);        \
    if (kvarn_try_status != KVARN_OK) return kvarn_try_status; \
  } while (false)

kvarn_status check_layout(const kvarn_layout* layout);
kvarn_status check_pages(const kvarn_layout& layout, const kvarn_pages* pages);
// Lengths, query starts and table width. `verb` names the caller in messages.
kvarn_status check_batch(const kvarn_layout& layout, const kvarn_batch* batch, bool with_queries);
// Every block-table entry from first(r) to end(r)-1 lies in the pool.
template <class First, class End>
kvarn_status check_entries(const kvarn_pages& pages, const kvarn_batch& batch, First first, End end);
kvarn_status bad_entry(const kvarn_pages& pages, int32_t request, int64_t index, int32_t value);

// data, dtype, strides and the shape [tokens][heads][head_dim]; heads -1: any.
kvarn_status check_rows(const char* what, const void* data, kvarn_dtype dtype, int64_t tokens, int64_t heads,
                        int64_t token_stride, int64_t head_stride, int64_t want_tokens, int64_t want_heads,
                        int32_t head_dim);
template <class Rows>
kvarn_status check_rows(const char* what, const Rows* rows, int64_t tokens, int64_t heads, int32_t head_dim) {
  if (rows == nullptr) return check_rows(what, nullptr, KVARN_FLOAT32, 0, 0, 0, 0, 1, 1, head_dim);
  return check_rows(what, rows->data, rows->dtype, rows->tokens, rows->heads, rows->token_stride, rows->head_stride,
                    tokens, heads, head_dim);
}
// What append's verbs know of their encoder and feedback; `alignment` of the latter in bytes.
kvarn_status check_encoder(kvarn_encoder encoder, const float* feedback, uintptr_t alignment);
// On the host, where its values can be seen.
kvarn_status check_balance(const kvarn_layout& layout, const float* balance);
kvarn_status check_workspace(const kvarn_workspace* workspace, int64_t bytes);

template <class First, class End>
kvarn_status check_entries(const kvarn_pages& pages, const kvarn_batch& batch, First first, End end) {
  for (int32_t r = 0; r < batch.requests; ++r) {
    const int32_t* row = batch.block_table + r * batch.table_stride;
    for (int64_t i = first(r), stop = end(r); i < stop; ++i)
      if (row[i] < 0 || row[i] >= pages.count) return bad_entry(pages, r, i, row[i]);
  }
  return KVARN_OK;
}

}  // namespace kvarn
