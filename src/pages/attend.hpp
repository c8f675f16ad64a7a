// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "pages/workspace.hpp"

namespace kvarn {

struct AttendPlan {
  int64_t blocks, units;  // row blocks; row blocks x KV heads
  int32_t rows_per_block;
  int32_t segments;  // 1: every unit runs whole; else the most segments of any unit
  int64_t part_columns() const { return segments > 1 ? units * segments * kMaxColumns : 0; }
};

// How a step is cut into units; `blocks` (may be null: only count) receives the row blocks.
AttendPlan plan_attend(const Step& step, int64_t query_heads, int32_t threads, RowBlock* blocks);

// Arguments are checked.
void attend(const Step& step, const Workspace& workspace, const AttendPlan& plan, const Kernels& kernels,
            const kvarn_executor* executor, const kvarn_rows& q, const kvarn_rows_out& out, float scale, float soft_cap,
            const float* balance);

}  // namespace kvarn
