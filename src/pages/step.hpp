// SPDX-License-Identifier: Apache-2.0
// One step of a layer, checked: who reads and writes which bytes of which page (specification sections 3, 8, 9).
#pragma once

#include <algorithm>
#include <cstdint>

#include "format/raw.hpp"
#include "target/kernels.hpp"

namespace kvarn {

struct Step {
  const kvarn_layout& layout;
  const kvarn_pages& pages;
  const kvarn_batch& batch;

  int32_t tokens() const { return batch.query_starts[batch.requests]; }
  int32_t length(int32_t r) const { return batch.seq_lens[r]; }
  int32_t queries(int32_t r) const { return length(r) > 0 ? batch.query_starts[r + 1] - batch.query_starts[r] : 0; }
  int32_t start(int32_t r) const { return length(r) - queries(r); }
  int32_t tile_of(int32_t position) const { return position / layout.page_tokens; }
  // Tiles that complete in this step: first_pack .. end_pack-1.
  int32_t first_pack(int32_t r) const { return tile_of(start(r)); }
  int32_t end_pack(int32_t r) const { return queries(r) > 0 ? tile_of(length(r)) : first_pack(r); }
  // Older raw tokens of request r that go through the workspace, because this step overwrites their place.
  int32_t staged(int32_t r) const {
    return queries(r) > 0 && format::must_stage(layout, start(r), length(r)) ? start(r) % layout.page_tokens : 0;
  }
  int64_t staged_tokens() const {
    int64_t sum = 0;
    for (int32_t r = 0; r < batch.requests; ++r) sum += staged(r);
    return sum;
  }

  // The region of (page `index` of request r, KV head): a record, or room for raw tokens.
  uint8_t* region(int32_t r, int32_t index, int32_t head) const {
    const int64_t page = batch.block_table[r * batch.table_stride + index];
    return pages.data + page * pages.stride + head * layout.record_bytes;
  }
  uint16_t* raw_k(int32_t r, int32_t position, int32_t head) const {
    const format::RawPlace at = format::raw_place(layout, position);
    return reinterpret_cast<uint16_t*>(region(r, at.page, head)) + format::raw_k_offset(layout, at.slot);
  }
  // From a raw K vector in a page to its V vector.
  int64_t raw_v_distance() const { return int64_t{layout.raw_tokens_per_page} * layout.head_dim; }
};

constexpr int64_t element_bytes(kvarn_dtype dtype) { return dtype == KVARN_FLOAT32 ? 4 : 2; }

// The vector of (token, head) in the caller's k, v, q or out.
inline const void* row_at(const kvarn_rows& rows, int64_t token, int64_t head) {
  const int64_t element = token * rows.token_stride + head * rows.head_stride;
  return static_cast<const uint8_t*>(rows.data) + element * element_bytes(rows.dtype);
}
inline void* row_at(const kvarn_rows_out& rows, int64_t token, int64_t head) {
  const int64_t element = token * rows.token_stride + head * rows.head_stride;
  return static_cast<uint8_t*>(rows.data) + element * element_bytes(rows.dtype);
}

// A KV head's part of a balance, null if there is none.
inline const float* balance_of(const kvarn_layout& layout, const float* balance, int32_t head) {
  return balance == nullptr ? nullptr : balance + int64_t{head} * layout.head_dim;
}

// The caller's threads, or the calling thread alone.
template <class Body>
void parallel_for(const kvarn_executor* executor, int64_t tasks, const Body& body) {
  if (executor == nullptr || executor->threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i, 0);
    return;
  }
  const kvarn_task call = [](void* argument, int64_t index, int32_t thread) {
    (*static_cast<const Body*>(argument))(index, thread);
  };
  executor->run(executor->context, tasks, call, const_cast<Body*>(&body));
}

inline int32_t thread_count(const kvarn_executor* executor) {
  return executor == nullptr ? 1 : std::max(1, executor->threads);
}

}  // namespace kvarn
