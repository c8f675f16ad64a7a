// SPDX-License-Identifier: Apache-2.0
// K's codes with feedback (specification section 6), 16 tokens in the lanes of a vector. Bit-equal to
// codec/feedback.cpp. head_dim / 2 fused multiply-adds an element, in chains that wait for each other: four side by
// side hide that.
namespace kvarn::KVARN_CPU {

// k [channel][token]; a channel's values become its errors once it has its codes.
static void feed_back(float* k, int channels, int tokens, int bits, const float* b, EncodedTile& grid) {
  constexpr int kChains = 4;
  static_assert(64 % (16 * kChains) == 0);
  const F top = set(static_cast<float>((1 << bits) - 1));
  for (int t = 0; t < tokens; t += 16 * kChains)
    for (int i = channels - 1; i >= 0; --i) {
      float* row = k + i * tokens + t;
      F y[kChains];
      KVARN_UNROLL
      for (int v = 0; v < kChains; ++v) y[v] = load(row + 16 * v);
      for (int j = channels - 1; j > i; --j) {
        const F w = set(-b[i * channels + j]);
        KVARN_UNROLL
        for (int v = 0; v < kChains; ++v) y[v] = fma(w, load(k + j * tokens + t + 16 * v), y[v]);
      }
      const F s = set(grid.s[i]), z = set(grid.z[i]), is = Fit::inverse(s);
      for (int v = 0; v < kChains; ++v) {
        const F c = load(grid.c + t + 16 * v), ic = set(1.0f) / c;
        const F code = rint(clamp((y[v] * ic - z) * is, set(0.0f), top));
        store(row + 16 * v, (code * s + z) * c - load(row + 16 * v));
        uint8_t codes[16];
        store_lanes_u8(codes, to_int(code));
        for (int l = 0; l < 16; ++l) grid.codes[(t + 16 * v + l) * channels + i] = codes[l];
      }
    }
}

}  // namespace kvarn::KVARN_CPU
