// SPDX-License-Identifier: Apache-2.0
// ln and e^x of specification section 7: fixed polynomials, so that every target takes the same decisions.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace kvarn::codec {

// x normal and positive.
inline float natural_log(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  float e = static_cast<float>(static_cast<int>(bits >> 23) - 127);
  float u = std::bit_cast<float>((bits & 0x7fffffu) | 0x3f800000u);
  if (u > 1.41421354f) u = u * .5f, e = e + 1.0f;
  const float f = u - 1.0f, g = f / (2.0f + f), h = g * g;
  const float series = 1.0f + h * (0.333333343f + h * (0.2f + h * (0.142857149f + h * 0.111111112f)));
  return e * 0.693147182f + 2.0f * g * series;
}

// |x| <= 80.
inline float exponential(float x) {
  const float n = std::rint(x * 1.44269502f);
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const float series =
      1.0f +
      f * (1.0f +
           f * (.5f + f * (0.166666672f +
                           f * (0.0416666679f + f * (0.00833333377f + f * (0.00138888892f + f * 1.98412701e-4f))))));
  return series * std::bit_cast<float>(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23);
}

}  // namespace kvarn::codec
