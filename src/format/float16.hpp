// SPDX-License-Identifier: Apache-2.0
// 16-bit floats in plain C++: exact widening, round-to-nearest-even narrowing.
#pragma once

#include <bit>
#include <cstdint>

namespace kvarn::format {

inline constexpr float kF16Max = 65504.0f;

constexpr float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // subnormal: mantissa * 2^-24, exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Round to nearest even; infinities and NaN stay what they are.
constexpr uint16_t float_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 2^16 or beyond
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves value * 2^24, rounded, in the low mantissa bits
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// f16(x) of the specification: saturates instead of overflowing. NaN becomes the negative limit, never NaN.
constexpr uint16_t float_to_f16_saturating(float value) {
  const float low = value > -kF16Max ? value : -kF16Max;
  return float_to_f16(low < kF16Max ? low : kF16Max);
}

constexpr float bf16_to_float(uint16_t h) { return std::bit_cast<float>(static_cast<uint32_t>(h) << 16); }

constexpr uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static_assert(f16_to_float(float_to_f16(1.0f / 3)) == 0.333251953125f && float_to_f16(0x1p-25f) == 0 &&
              float_to_f16(0x1.8p-24f) == 2);
static_assert(float_to_f16(65519.0f) == 0x7bff && float_to_f16(65520.0f) == 0x7c00);

}  // namespace kvarn::format
