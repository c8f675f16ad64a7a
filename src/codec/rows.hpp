// SPDX-License-Identifier: Apache-2.0
// Vectors of any dtype: load, store, and the rotation of specification section 2.
#pragma once

#include <cmath>
#include <cstdint>

#include "format/float16.hpp"
#include "kvarn/kvarn.h"

namespace kvarn::codec {

inline float load(const void* in, kvarn_dtype dtype, int i) {
  switch (dtype) {
    case KVARN_FLOAT16:
      return format::f16_to_float(static_cast<const uint16_t*>(in)[i]);
    case KVARN_BFLOAT16:
      return format::bf16_to_float(static_cast<const uint16_t*>(in)[i]);
    default:
      return static_cast<const float*>(in)[i];
  }
}

inline void store(float value, void* out, kvarn_dtype dtype, int i) {
  switch (dtype) {
    case KVARN_FLOAT16:
      static_cast<uint16_t*>(out)[i] = format::float_to_f16(value);
      break;
    case KVARN_BFLOAT16:
      static_cast<uint16_t*>(out)[i] = format::float_to_bf16(value);
      break;
    default:
      static_cast<float*>(out)[i] = value;
  }
}

// The power-of-two block that starts at `start`: 80 = 64 + 16, 96 = 64 + 32.
constexpr int rotation_block(int head_dim, int start) {
  int block = 1;
  while (2 * block <= head_dim - start) block *= 2;
  return block;
}

inline void rotate(float* x, int head_dim) {
  for (int start = 0, block; start < head_dim; start += block) {
    block = rotation_block(head_dim, start);
    float* y = x + start;
    for (int h = 1; h < block; h *= 2)
      for (int i = 0; i < block; ++i)
        if ((i & h) == 0) {
          const float a = y[i], b = y[i + h];
          y[i] = a + b;
          y[i + h] = a - b;
        }
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
    for (int i = 0; i < block; ++i) y[i] = y[i] * scale;
  }
}

// NaN -> 0, magnitudes above 65504 -> 65504; true if it had to.
inline bool sanitize(float& x) {
  if (std::fabs(x) <= format::kF16Max) return false;
  x = x > 0 ? format::kF16Max : x < 0 ? -format::kF16Max : 0.0f;
  return true;
}

}  // namespace kvarn::codec
