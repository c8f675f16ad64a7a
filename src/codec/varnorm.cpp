// SPDX-License-Identifier: Apache-2.0
// The encoder `varnorm`, the published algorithm (arXiv 2606.03458), as specification section 7 writes it.
#include <cmath>

#include "codec/sum.hpp"
#include "codec/tile.hpp"
#include "codec/transcendental.hpp"

namespace kvarn::codec {
namespace {

template <class Term>
float deviation(int n, Term term) {
  const float mean = sum(n, term) / static_cast<float>(n);
  const float squares = sum(n, [&](int i) { return (term(i) - mean) * (term(i) - mean); });
  return std::sqrt(squares / static_cast<float>(n - 1));
}

struct Normalizer {
  const Tile& m;
  float* x;  // [row][column]
  float col[format::kMaxHeadDim], row[format::kMaxHeadDim];

  float& at(int i, int j) const { return x[i * m.columns + j]; }
  void divide(const float* sc, const float* sr) const {
    for (int i = 0; i < m.rows; ++i)
      for (int j = 0; j < m.columns; ++j) at(i, j) = m(i, j) / sc[j] / sr[i];
  }
  void column_deviations() {
    for (int j = 0; j < m.columns; ++j) col[j] = deviation(m.rows, [&](int i) { return at(i, j); });
  }
  void row_deviations() {
    for (int i = 0; i < m.rows; ++i) row[i] = deviation(m.columns, [&](int j) { return at(i, j); });
  }
  static float spread(const float* std, int n) {
    float low = std[0], high = std[0];
    for (int i = 1; i < n; ++i) low = smaller(low, std[i]), high = larger(high, std[i]);
    return high / larger(low, 1e-8f);
  }
  float imbalance() {
    column_deviations();
    row_deviations();
    return spread(col, m.columns) + spread(row, m.rows);
  }
};

void update(float* log_scale, float* scale, const float* std, int n) {
  for (int i = 0; i < n; ++i) {
    log_scale[i] = clamp(log_scale[i] + natural_log(clamp(std[i], 1e-3f, 1e3f)), -0.3f, 10.0f);
    scale[i] = exponential(log_scale[i]);
  }
}

}  // namespace

void varnorm(const Tile& tile, Encoded& out, float* scratch) {
  constexpr int kIterations = 8;
  Normalizer n{tile, scratch, {}, {}};
  float a[format::kMaxHeadDim] = {}, r[format::kMaxHeadDim] = {};
  float ea[format::kMaxHeadDim], er[format::kMaxHeadDim], sc[format::kMaxHeadDim], sr[format::kMaxHeadDim];
  for (int j = 0; j < format::kMaxHeadDim; ++j) ea[j] = er[j] = sc[j] = sr[j] = 1.0f;

  n.divide(ea, er);
  float best = n.imbalance();
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    n.column_deviations();
    update(a, ea, n.col, tile.columns);
    n.divide(ea, er);
    n.row_deviations();
    update(r, er, n.row, tile.rows);
    n.divide(ea, er);
    const float now = n.imbalance();
    if (now <= best) {
      best = now;
      for (int j = 0; j < tile.columns; ++j) sc[j] = ea[j];
      for (int i = 0; i < tile.rows; ++i) sr[i] = er[i];
    }
  }

  n.divide(sc, sr);
  for (int i = 0; i < tile.rows; ++i) {
    float lo = n.at(i, 0), hi = lo;
    for (int j = 1; j < tile.columns; ++j) lo = smaller(lo, n.at(i, j)), hi = larger(hi, n.at(i, j));
    const float s = larger((hi - lo) / tile.qmax(), 1e-10f);
    for (int j = 0; j < tile.columns; ++j)
      out.code(tile, i, j) = static_cast<uint8_t>(std::rint(clamp((n.at(i, j) - lo) / s, 0.0f, tile.qmax())));
    out.s[i] = f16(sr[i] * s);
    out.z[i] = f16(sr[i] * lo);
  }
  for (int j = 0; j < tile.columns; ++j) out.c[j] = f16(sc[j]);
}

}  // namespace kvarn::codec
