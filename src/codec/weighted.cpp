// SPDX-License-Identifier: Apache-2.0
// The encoder `weighted`, as specification section 6 writes it, one statement per line of the text.
#include <bit>
#include <cmath>

#include "codec/sum.hpp"
#include "codec/tile.hpp"

namespace kvarn::codec {
namespace {

struct Fit {
  const Tile& m;
  const TokenWeights& weights;
  Encoded& grid;

  float x(int i, int j) const { return m(i, j) * (1.0f / grid.c[j]); }
  float code(int i, int j) const {
    const float is = 1.0f / larger(grid.s[i], 1e-10f);
    return std::rint(clamp((x(i, j) - grid.z[i]) * is, 0.0f, m.qmax()));
  }
  float w(int j) const { return m.side == Side::kKeys ? weights.wk[j] : grid.c[j] * grid.c[j]; }
  float u(int i) const { return m.side == Side::kKeys ? 1.0f : weights.wv[i]; }

  template <class Term>
  float sum_columns(Term term) const {
    return sum(m.columns, term);
  }

  void token_norm() {
    float norm[format::kMaxPageTokens];
    int exponents = 0;
    for (int t = 0; t < m.columns; ++t) {
      norm[t] = std::sqrt(weights.nk[t] / static_cast<float>(m.rows));
      const int e = static_cast<int>(std::bit_cast<uint32_t>(norm[t]) >> 23) - 127;
      exponents += e > -24 ? e : -24;
    }
    const int twice = 2 * exponents + m.columns, n = 2 * m.columns;
    const int mean = twice >= 0 ? twice / n : -((n - 1 - twice) / n);  // floor
    const float inverse = std::bit_cast<float>(static_cast<uint32_t>(127 - mean) << 23);
    for (int t = 0; t < m.columns; ++t) grid.c[t] = f16(clamp(norm[t] * inverse, 0x1p-8f, 0x1p8f));
  }

  void start(int i) {
    const float f = m.bits == 2 ? .65f : m.side == Side::kKeys ? 1.0f : m.bits == 3 ? .75f : m.bits == 4 ? .9f : 1.0f;
    float lo = x(i, 0), hi = lo;
    for (int j = 1; j < m.columns; ++j) lo = smaller(lo, x(i, j)), hi = larger(hi, x(i, j));
    const float width = hi - lo;
    grid.s[i] = f * width / m.qmax();
    grid.z[i] = (lo + hi) * .5f - f * width * .5f;
  }

  void solve(int i) {
    float q[format::kMaxHeadDim];
    for (int j = 0; j < m.columns; ++j) q[j] = code(i, j);
    const float sw = sum_columns([&](int j) { return w(j); });
    const float sq = sum_columns([&](int j) { return w(j) * q[j]; });
    const float sqq = sum_columns([&](int j) { return w(j) * q[j] * q[j]; });
    const float sx = sum_columns([&](int j) { return w(j) * x(i, j); });
    const float sqx = sum_columns([&](int j) { return w(j) * q[j] * x(i, j); });
    const float det = sw * sqq - sq * sq;
    const float s = (sw * sqx - sq * sx) / det;
    if (det > 1e-12f * sw * sqq && s > 0) {
      grid.s[i] = s;
      grid.z[i] = (sx - s * sq) / sw;
    }
  }

  float error(int i) const {
    return sum_columns([&](int j) {
      const float r = code(i, j) * grid.s[i] + grid.z[i] - x(i, j);
      return w(j) * r * r;
    });
  }

  void refit_columns() {
    float c[format::kMaxHeadDim];
    for (int j = 0; j < m.columns; ++j) {
      const auto y = [&](int i) { return code(i, j) * grid.s[i] + grid.z[i]; };
      const float numerator = sum(m.rows, [&](int i) { return u(i) * m(i, j) * y(i); });
      const float denominator = sum(m.rows, [&](int i) { return u(i) * y(i) * y(i); });
      const float ratio = numerator / denominator;
      c[j] = .25f * grid.c[j] < ratio && ratio < 4.0f * grid.c[j] ? f16(ratio) : grid.c[j];
    }
    for (int j = 0; j < m.columns; ++j) grid.c[j] = c[j];
  }

  void round_grid() {
    for (int i = 0; i < m.rows; ++i) grid.s[i] = f16(grid.s[i]), grid.z[i] = f16(grid.z[i]);
  }

  void write_codes() {
    for (int i = 0; i < m.rows; ++i)
      for (int j = 0; j < m.columns; ++j) grid.code(m, i, j) = static_cast<uint8_t>(code(i, j));
  }

  void debias(int i) {
    const auto y = [&](int j) { return grid.code(m, i, j) * grid.s[i] + grid.z[i]; };
    const float sw = sum_columns([&](int j) { return w(j); });
    const float mx = sum_columns([&](int j) { return w(j) * x(i, j); }) / sw;
    const float my = sum_columns([&](int j) { return w(j) * y(j); }) / sw;
    const float a = sum_columns([&](int j) { return w(j) * (x(i, j) - mx) * (x(i, j) - mx); });
    const float b = sum_columns([&](int j) { return w(j) * (x(i, j) - mx) * (y(j) - my); });
    const float g = b > 0 ? clamp(a / b, .8f, 1.5f) : 1.0f;
    grid.s[i] = f16(grid.s[i] * g);
    grid.z[i] = f16(mx - (my - grid.z[i]) * g);
  }

  void fit() {
    if (m.side == Side::kKeys)
      token_norm();
    else
      for (int j = 0; j < m.columns; ++j) grid.c[j] = 1.0f;
    for (int i = 0; i < m.rows; ++i) {
      start(i);
      const float s = grid.s[i], z = grid.z[i], e0 = error(i);
      solve(i);
      if (!(error(i) < e0)) grid.s[i] = s, grid.z[i] = z;
    }
    for (int round = 0; round < 2; ++round) {
      refit_columns();
      for (int i = 0; i < m.rows; ++i) solve(i), solve(i);
    }
    round_grid();
    write_codes();
    if (m.side == Side::kValues)
      for (int i = 0; i < m.rows; ++i) debias(i);
  }
};

}  // namespace

TokenWeights token_weights(const float* k, const float* v, int tokens, int head_dim) {
  constexpr float tiny = 0x1p-40f;
  TokenWeights out;
  float nv[format::kMaxPageTokens];
  for (int t = 0; t < tokens; ++t) {
    const float *kt = k + t * head_dim, *vt = v + t * head_dim;
    out.nk[t] = sum(head_dim, [&](int d) { return kt[d] * kt[d]; });
    nv[t] = sum(head_dim, [&](int d) { return vt[d] * vt[d]; });
  }
  const float mean_k = sum(tokens, [&](int t) { return out.nk[t]; }) / static_cast<float>(tokens);
  const float mean_v = sum(tokens, [&](int t) { return nv[t]; }) / static_cast<float>(tokens);
  for (int t = 0; t < tokens; ++t) {
    const float rk = mean_k / larger(out.nk[t], tiny), rv = mean_v / larger(nv[t], tiny);
    out.wk[t] = clamp(rv * rk, 1.0f, 4096.0f);
    out.wv[t] = smaller(rv * rv * rv, 131072.0f);
  }
  return out;
}

void weighted(const Tile& tile, const TokenWeights& weights, Encoded& out) { Fit{tile, weights, out}.fit(); }

}  // namespace kvarn::codec
