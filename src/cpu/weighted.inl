// SPDX-License-Identifier: Apache-2.0
// The encoder `weighted` (specification section 6), 16 rows in the lanes of a vector. Bit-equal to codec/weighted.cpp.
//
// A tile is [column][row] in floats: K [token][channel], V [channel][token]. About 165 operations an element; one
// pass over the tile (64 KiB at 128 x 128) per line of the specification that sums or takes codes.
namespace kvarn::KVARN_CPU {

struct TokenWeights {
  float nk[format::kMaxPageTokens], wk[format::kMaxPageTokens], wv[format::kMaxPageTokens];
};

// k, v [token][head_dim]
static void token_weights(const float* k, const float* v, int tokens, int head_dim, TokenWeights& out) {
  const F tiny = set(0x1p-40f);
  float nv[format::kMaxPageTokens];
  const auto squares = [head_dim](const float* x) {
    return sum_blocks(head_dim, [x](int i) { return load(x + i) * load(x + i); });
  };
  for (int t = 0; t < tokens; ++t) {
    out.nk[t] = squares(k + t * head_dim);
    nv[t] = squares(v + t * head_dim);
  }
  const auto mean = [tokens](const float* x) {
    return set(sum_blocks(tokens, [x](int i) { return load(x + i); }) / static_cast<float>(tokens));
  };
  const F mean_k = mean(out.nk), mean_v = mean(nv);
  for (int t = 0; t < tokens; t += 16) {
    const F rk = mean_k / max(load(out.nk + t), tiny), rv = mean_v / max(load(nv + t), tiny);
    store(out.wk + t, clamp(rv * rk, set(1.0f), set(4096.0f)));
    store(out.wv + t, min(rv * rv * rv, set(131072.0f)));
  }
}

struct EncodedTile {
  float s[format::kMaxHeadDim], z[format::kMaxHeadDim], c[format::kMaxHeadDim];
  uint8_t* codes;  // [column][row]
};

struct Fit {
  const float* m;  // [column][row]
  int rows, columns, bits;
  bool keys;
  const TokenWeights& weights;
  EncodedTile& grid;
  float ic[format::kMaxHeadDim], w[format::kMaxHeadDim];  // per column: 1 / c, the weight of a residual
  float sw;                                               // SUM_j w

  float qmax() const { return static_cast<float>((1 << bits) - 1); }
  KVARN_INLINE F x(int i, int j) const { return load(m + j * rows + i) * set(ic[j]); }
  KVARN_INLINE static F inverse(F s) { return set(1.0f) / max(s, set(1e-10f)); }
  KVARN_INLINE F code(F value, F z, F is) const { return rint(clamp((value - z) * is, set(0.0f), set(qmax()))); }

  void columns_changed() {
    for (int j = 0; j < columns; j += 16) {
      const F c = load(grid.c + j);
      store(ic + j, set(1.0f) / c);
      store(w + j, keys ? load(weights.wk + j) : c * c);
    }
    sw = sum_blocks(columns, [this](int j) { return load(w + j); });
  }

  void token_norm() {
    float norm[format::kMaxPageTokens];
    int exponents = 0;
    for (int t = 0; t < columns; t += 16) store(norm + t, sqrt(load(weights.nk + t) / set(static_cast<float>(rows))));
    for (int t = 0; t < columns; ++t) {
      uint32_t word;
      __builtin_memcpy(&word, norm + t, 4);
      const int e = static_cast<int>(word >> 23) - 127;
      exponents += e > -24 ? e : -24;
    }
    const int twice = 2 * exponents + columns, n = 2 * columns;
    const int mean = twice >= 0 ? twice / n : -((n - 1 - twice) / n);  // floor
    const F scale = as_float(set((127 - mean) << 23));
    for (int t = 0; t < columns; t += 16)
      store(grid.c + t, round_f16(clamp(load(norm + t) * scale, set(0x1p-8f), set(0x1p8f))));
  }

  KVARN_INLINE void start(int i, F& s, F& z) const {
    const float fraction = bits == 2 ? .65f : keys ? 1.0f : bits == 3 ? .75f : bits == 4 ? .9f : 1.0f;
    F lo = x(i, 0), hi = lo;
    for (int j = 1; j < columns; ++j) {
      const F value = x(i, j);
      lo = min(lo, value);
      hi = max(hi, value);
    }
    const F f = set(fraction), width = hi - lo;
    s = f * width / set(qmax());
    z = (lo + hi) * set(.5f) - f * width * set(.5f);
  }

  // solve, and the error of the grid that it starts from.
  [[gnu::noinline]] void solve(int i, F& s, F& z, F& error) const {
    const F is = inverse(s), s0 = s, z0 = z;
    const Sums<5> sum = sum_columns<5>(columns, [&](int j) {
      const F value = x(i, j), q = code(value, z0, is), weight = set(w[j]), wq = weight * q;
      const F r = q * s0 + z0 - value;
      return Sums<5>{{wq, wq * q, weight * value, wq * value, weight * r * r}};
    });
    const F sq = sum.v[0], sqq = sum.v[1], sx = sum.v[2], sqx = sum.v[3], all = set(sw);
    error = sum.v[4];
    const F det = all * sqq - sq * sq, s1 = (all * sqx - sq * sx) / det;
    const M take = both(less(set(1e-12f) * all * sqq, det), less(set(0.0f), s1));
    s = select(take, s1, s);
    z = select(take, (sx - s1 * sq) / all, z);
  }

  [[gnu::noinline]] F error(int i, F s, F z) const {
    const F is = inverse(s);
    return sum_columns<1>(columns,
                          [&](int j) {
                            const F value = x(i, j), r = code(value, z, is) * s + z - value;
                            return Sums<1>{{set(w[j]) * r * r}};
                          })
        .v[0];
  }

  [[gnu::noinline]] void refit_columns() {
    float is[format::kMaxHeadDim];
    for (int i = 0; i < rows; i += 16) store(is + i, inverse(load(grid.s + i)));
    for (int j = 0; j < columns; ++j) {
      F above[2], below[2];  // partials 0 to 15 and 16 to 31
      const F scale = set(ic[j]);
      for (int i = 0; i < rows; i += 16) {
        const F value = load(m + j * rows + i), s = load(grid.s + i), z = load(grid.z + i);
        const F y = code(value * scale, z, load(is + i)) * s + z;
        const F u = keys ? set(1.0f) : load(weights.wv + i), numerator = u * value * y, denominator = u * y * y;
        const int half = i / 16 % 2;
        above[half] = i < 32 ? numerator : above[half] + numerator;
        below[half] = i < 32 ? denominator : below[half] + denominator;
      }
      const float ratio = sum_lanes(above[0] + above[1]) / sum_lanes(below[0] + below[1]);
      if (.25f * grid.c[j] < ratio && ratio < 4.0f * grid.c[j]) grid.c[j] = first(round_f16(set(ratio)));
    }
    columns_changed();
  }

  void round_grid() {
    for (int i = 0; i < rows; i += 16) {
      store(grid.s + i, round_f16(load(grid.s + i)));
      store(grid.z + i, round_f16(load(grid.z + i)));
    }
  }

  [[gnu::noinline]] void write_codes() {
    for (int i = 0; i < rows; i += 16) {
      const F z = load(grid.z + i), is = inverse(load(grid.s + i));
      for (int j = 0; j < columns; ++j) store_lanes_u8(grid.codes + j * rows + i, to_int(code(x(i, j), z, is)));
    }
  }

  [[gnu::noinline]] void debias(int i) {
    const F s = load(grid.s + i), z = load(grid.z + i), all = set(sw);
    const auto y = [&](int j) { return load_u8(grid.codes + j * rows + i) * s + z; };
    const Sums<2> mean =
        sum_columns<2>(columns, [&](int j) { return Sums<2>{{set(w[j]) * x(i, j), set(w[j]) * y(j)}}; });
    const F mx = mean.v[0] / all, my = mean.v[1] / all;
    const Sums<2> square = sum_columns<2>(columns, [&](int j) {
      const F dx = x(i, j) - mx, wdx = set(w[j]) * dx;
      return Sums<2>{{wdx * dx, wdx * (y(j) - my)}};
    });
    const F ratio = clamp(square.v[0] / square.v[1], set(.8f), set(1.5f));
    const F g = select(less(set(0.0f), square.v[1]), ratio, set(1.0f));
    store(grid.s + i, round_f16(s * g));
    store(grid.z + i, round_f16(mx - (my - z) * g));
  }

  void fit() {
    if (keys)
      token_norm();
    else
      for (int j = 0; j < columns; ++j) grid.c[j] = 1.0f;
    columns_changed();
    for (int i = 0; i < rows; i += 16) {
      F s0, z0, e0;
      start(i, s0, z0);
      F s = s0, z = z0;
      solve(i, s, z, e0);
      const M better = less(error(i, s, z), e0);
      store(grid.s + i, select(better, s, s0));
      store(grid.z + i, select(better, z, z0));
    }
    for (int round = 0; round < 2; ++round) {
      refit_columns();
      for (int i = 0; i < rows; i += 16) {
        F s = load(grid.s + i), z = load(grid.z + i), ignored;
        solve(i, s, z, ignored);
        solve(i, s, z, ignored);
        store(grid.s + i, s);
        store(grid.z + i, z);
      }
    }
    round_grid();
    write_codes();
    if (!keys)
      for (int i = 0; i < rows; i += 16) debias(i);
  }
};

static void weighted(const float* m, int rows, int columns, int bits, bool keys, const TokenWeights& weights,
                     EncodedTile& out) {
  Fit{m, rows, columns, bits, keys, weights, out, {}, {}, 0}.fit();
}

}  // namespace kvarn::KVARN_CPU
