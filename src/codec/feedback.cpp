// SPDX-License-Identifier: Apache-2.0
// K's codes with feedback, as specification section 6 writes them.
#include <cmath>

#include "codec/tile.hpp"

namespace kvarn::codec {

void feed_back(const Tile& k, const float* b, Encoded& grid) {
  const int channels = k.rows;
  float delta[format::kMaxHeadDim];
  for (int t = 0; t < k.columns; ++t)
    for (int i = channels - 1; i >= 0; --i) {
      float y = k(i, t);
      for (int j = channels - 1; j > i; --j) y = std::fma(-b[i * channels + j], delta[j], y);
      const float ic = 1.0f / grid.c[t], is = 1.0f / larger(grid.s[i], 1e-10f);
      const float code = std::rint(clamp((y * ic - grid.z[i]) * is, 0.0f, k.qmax()));
      grid.code(k, i, t) = static_cast<uint8_t>(code);
      delta[i] = (code * grid.s[i] + grid.z[i]) * grid.c[t] - k(i, t);
    }
}

}  // namespace kvarn::codec
