// SPDX-License-Identifier: Apache-2.0
// What a plan is made of, and the search that its parts share.
#pragma once

#include "cuda/plan.hpp"

namespace kvarn::cuda {

struct PlanInputs {
  kvarn_layout layout;
  kvarn_batch batch;
  const int64_t* slots;
  int32_t tokens, max_seq_len, group, columns, window, ctas, teams;
  bool defer;
  int32_t max_tiles, max_raw_tiles, max_blocks;
};

// The last index i in 0 .. count-1 with key(i) <= value; key(0) <= value.
template <class Key, class Value>
__device__ inline int32_t last_at_most(int32_t count, Value value, Key key) {
  int32_t low = 0;
  for (int32_t high = count; high - low > 1;) {
    const int32_t middle = (low + high) / 2;
    (key(middle) <= value ? low : high) = middle;
  }
  return low;
}

}  // namespace kvarn::cuda
