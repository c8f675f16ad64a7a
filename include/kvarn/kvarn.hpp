// SPDX-License-Identifier: Apache-2.0
// kvarn in C++20: a thin skin over kvarn.h. The same rules hold: the caller owns all memory and threads, nothing
// throws, a failed call changed nothing.
//
//   kvarn::Layout layout;
//   if (kvarn::Status s = kvarn::Layout::make("kvarn_k4v2_g128", 128, 8, layout); !s) return report(s.message());
//   kvarn::WorkspaceBuffer workspace(layout.workspace_bytes(tokens, requests, query_heads, max_seq_len));
//   kvarn::append(layout, pages, batch, k, v, workspace);
//   kvarn::attend(layout, pages, batch, q, out, {.scale = 0.088f}, workspace);
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <type_traits>

#include "kvarn/kvarn.h"

namespace kvarn {

// The outcome of a call. Converts to true when it succeeded.
class [[nodiscard]] Status {
 public:
  constexpr Status() = default;
  explicit Status(kvarn_status code) : code_(code), message_(code == KVARN_OK ? "" : kvarn_last_error()) {}

  explicit operator bool() const { return code_ == KVARN_OK; }
  kvarn_status code() const { return code_; }
  // What was given, what is allowed, what to do.
  std::string message() const { return message_.empty() ? kvarn_status_message(code_) : message_; }

 private:
  kvarn_status code_ = KVARN_OK;
  std::string message_;
};

// Everything that follows from (preset, head_dim, kv_heads); see kvarn_layout for the fields.
struct Layout : kvarn_layout {
  static Status make(std::string_view preset, int32_t head_dim, int32_t kv_heads, Layout& out) {
    return Status(kvarn_layout_init(std::string(preset).c_str(), head_dim, kv_heads, &out));
  }
  // 0 for arguments out of range.
  int64_t workspace_bytes(int64_t tokens, int64_t requests, int64_t query_heads, int64_t max_seq_len,
                          int32_t threads = 1) const {
    int64_t bytes = 0;
    return kvarn_workspace_bytes(this, tokens, requests, query_heads, max_seq_len, threads, &bytes) == KVARN_OK ? bytes
                                                                                                                : 0;
  }
  // Block-table entries that a running request of `tokens` tokens needs.
  int64_t pages_of(int64_t tokens) const { return (tokens + page_tokens - 1) / page_tokens + pages_ahead; }
};

// Contiguous [tokens][heads][head_dim].
inline kvarn_rows rows(const void* data, kvarn_dtype dtype, int64_t tokens, int64_t heads, int64_t head_dim) {
  return {data, dtype, tokens, heads, heads * head_dim, head_dim};
}
inline kvarn_rows_out rows_out(void* data, kvarn_dtype dtype, int64_t tokens, int64_t heads, int64_t head_dim) {
  return {data, dtype, tokens, heads, heads * head_dim, head_dim};
}

// 64-byte aligned memory for a workspace, for callers without an allocator of their own.
class WorkspaceBuffer {
 public:
  explicit WorkspaceBuffer(int64_t bytes)
      : bytes_(bytes), data_(::operator new(static_cast<size_t>(bytes > 0 ? bytes : 1), std::align_val_t{64})) {}
  operator kvarn_workspace() const { return {data_.get(), bytes_}; }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  int64_t bytes_;
  std::unique_ptr<void, Free> data_;
};

// Makes an executor of a pool: anything with `threads()` and `run(tasks, body)`, which calls body(index, thread) for
// every index as kvarn_executor demands. The pool must outlive the executor.
template <class Pool>
kvarn_executor executor(Pool& pool) {
  return {
      &pool, static_cast<int32_t>(pool.threads()), [](void* context, int64_t tasks, kvarn_task task, void* argument) {
        static_cast<Pool*>(context)->run(tasks, [=](int64_t index, int32_t thread) { task(argument, index, thread); });
      }};
}

struct Scores {
  float scale = 1.0f;
  float soft_cap = 0.0f;  // 0: off
};

inline Status append(const Layout& layout, const kvarn_pages& pages, const kvarn_batch& batch, const kvarn_rows& k,
                     const kvarn_rows& v, const kvarn_workspace& workspace, kvarn_encoder encoder = KVARN_WEIGHTED,
                     const kvarn_options* options = nullptr, int64_t* replaced = nullptr,
                     const float* feedback = nullptr, const float* balance = nullptr) {
  return Status(
      kvarn_append(&layout, &pages, &batch, &k, &v, encoder, feedback, balance, &workspace, options, replaced));
}

inline Status attend(const Layout& layout, const kvarn_pages& pages, const kvarn_batch& batch, const kvarn_rows& q,
                     const kvarn_rows_out& out, Scores scores, const kvarn_workspace& workspace,
                     const kvarn_options* options = nullptr, const float* balance = nullptr) {
  return Status(
      kvarn_attend(&layout, &pages, &batch, &q, &out, scores.scale, scores.soft_cap, balance, &workspace, options));
}

inline Status expand(const Layout& layout, const kvarn_pages& pages, const kvarn_batch& batch, const kvarn_rows_out& k,
                     const kvarn_rows_out& v, const kvarn_workspace& workspace,
                     const kvarn_options* options = nullptr) {
  return Status(kvarn_expand(&layout, &pages, &batch, &k, &v, &workspace, options));
}

inline Status rotate(int32_t head_dim, const kvarn_rows& in, const kvarn_rows_out& out,
                     const kvarn_options* options = nullptr) {
  return Status(kvarn_rotate(head_dim, &in, &out, options));
}

}  // namespace kvarn
