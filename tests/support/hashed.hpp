// SPDX-License-Identifier: Apache-2.0
// Random but repeatable numbers for tests.
#pragma once

#include <cstdint>
#include <vector>

namespace kvarn::test {

// A 32-bit mixing function: the same numbers everywhere.
inline uint32_t mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du;
  x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
// About normal, deviation 1.16; exact in binary16.
inline float hashed(uint32_t index, uint32_t seed) {
  const uint32_t x = mix(index * 2654435769u + seed);
  return static_cast<float>(static_cast<int>((x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24)) - 510) / 128.0f;
}
inline std::vector<float> hashed_rows(size_t count, uint32_t seed) {
  std::vector<float> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = hashed(static_cast<uint32_t>(i), seed);
  return out;
}

// Feedback of one head, as tests/golden/make.py describes it.
inline std::vector<float> hashed_feedback(uint32_t head_dim) {
  std::vector<float> out(size_t{head_dim} * head_dim, __builtin_nanf(""));
  for (uint32_t i = 0; i < head_dim; ++i)
    for (uint32_t j = i + 1; j < head_dim; ++j) out[size_t{i} * head_dim + j] = hashed(i * head_dim + j, 3) / 16;
  return out;
}

}  // namespace kvarn::test
