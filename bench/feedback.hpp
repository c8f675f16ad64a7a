// SPDX-License-Identifier: Apache-2.0
// What append is timed with where it takes feedback.
#pragma once

#include <cstddef>
#include <vector>

namespace timed {

// [head][channel][channel]: above the diagonal numbers that pass about half of an error on.
inline std::vector<float> feedback(int heads, int head_dim) {
  const auto size = static_cast<size_t>(head_dim);
  std::vector<float> b(static_cast<size_t>(heads) * size * size, 0.0f);
  for (size_t at = 0; at < b.size(); ++at)
    if (at % size > at / size % size) b[at] = static_cast<float>(at * 2654435769u % 101) * 0.0016f - 0.08f;
  return b;
}

}  // namespace timed
