// SPDX-License-Identifier: Apache-2.0
// The encoder `varnorm` (specification section 7). Bit-equal to codec/varnorm.cpp.
namespace kvarn::KVARN_CPU {

KVARN_INLINE F natural_log(F x) {
  const I bits = as_int(x);
  F e = to_float(sub(shift_right(bits, 23), set(127)));
  F u = as_float(bit_or(bit_and(bits, set(0x7fffff)), set(0x3f800000)));
  const M high = less(set(1.41421354f), u);
  u = select(high, u * set(.5f), u);
  e = select(high, e + set(1.0f), e);
  const F f = u - set(1.0f), g = f / (set(2.0f) + f), h = g * g;
  const F series =
      set(1.0f) + h * (set(0.333333343f) + h * (set(0.2f) + h * (set(0.142857149f) + h * set(0.111111112f))));
  return e * set(0.693147182f) + set(2.0f) * g * series;
}

KVARN_INLINE F exponential(F x) {
  const F n = rint(x * set(1.44269502f));
  const F f = (x - n * set(0.693359375f)) - n * set(-2.12194440e-4f);
  F p = set(0.00138888892f) + f * set(1.98412701e-4f);
  p = set(0.00833333377f) + f * p;
  p = set(0.0416666679f) + f * p;
  p = set(0.166666672f) + f * p;
  p = set(.5f) + f * p;
  p = set(1.0f) + f * p;
  p = set(1.0f) + f * p;
  return p * as_float(shift_left(add(to_int(n), set(127)), 23));
}

struct Normalizer {
  const float* m;  // [column][row]
  int rows, columns;
  float* x;  // [column][row]
  float column_std[format::kMaxHeadDim], row_std[format::kMaxHeadDim];

  [[gnu::noinline]] void divide(const float* column_scale, const float* row_scale) const {
    for (int j = 0; j < columns; ++j)
      for (int i = 0; i < rows; i += 16)
        store(x + j * rows + i, load(m + j * rows + i) / set(column_scale[j]) / load(row_scale + i));
  }
  [[gnu::noinline]] void column_deviations() {
    for (int j = 0; j < columns; ++j) {
      const float* column = x + j * rows;
      const F mean = set(sum_blocks(rows, [column](int i) { return load(column + i); }) / static_cast<float>(rows));
      const float squares = sum_blocks(rows, [column, mean](int i) {
        const F d = load(column + i) - mean;
        return d * d;
      });
      column_std[j] = first(sqrt(set(squares / static_cast<float>(rows - 1))));
    }
  }
  [[gnu::noinline]] void row_deviations() {
    for (int i = 0; i < rows; i += 16) {
      const F total = sum_columns<1>(columns, [&](int j) { return Sums<1>{{load(x + j * rows + i)}}; }).v[0];
      const F mean = total / set(static_cast<float>(columns));
      const F squares = sum_columns<1>(columns, [&](int j) {
                          const F d = load(x + j * rows + i) - mean;
                          return Sums<1>{{d * d}};
                        }).v[0];
      store(row_std + i, sqrt(squares / set(static_cast<float>(columns - 1))));
    }
  }
  static float spread(const float* std, int n) {
    float low = std[0], high = std[0];
    for (int i = 1; i < n; ++i) {
      low = low < std[i] ? low : std[i];
      high = high > std[i] ? high : std[i];
    }
    return high / (low > 1e-8f ? low : 1e-8f);
  }
  float imbalance() {
    column_deviations();
    row_deviations();
    return spread(column_std, columns) + spread(row_std, rows);
  }
};

static void update_scales(float* log_scale, float* scale, const float* std, int n) {
  for (int i = 0; i < n; i += 16) {
    const F step = natural_log(clamp(load(std + i), set(1e-3f), set(1e3f)));
    const F log = clamp(load(log_scale + i) + step, set(-0.3f), set(10.0f));
    store(log_scale + i, log);
    store(scale + i, exponential(log));
  }
}

static void varnorm(const float* m, int rows, int columns, int bits, float* work, EncodedTile& out) {
  constexpr int kIterations = 8;
  Normalizer n{m, rows, columns, work, {}, {}};
  float a[format::kMaxHeadDim] = {}, r[format::kMaxHeadDim] = {};
  float ea[format::kMaxHeadDim], er[format::kMaxHeadDim], sc[format::kMaxHeadDim], sr[format::kMaxHeadDim];
  for (int j = 0; j < format::kMaxHeadDim; ++j) ea[j] = er[j] = sc[j] = sr[j] = 1.0f;
  const auto keep = [](const float* from, float* to, int count) {
    for (int i = 0; i < count; i += 16) store(to + i, load(from + i));
  };

  n.divide(ea, er);
  float best = n.imbalance();
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    n.column_deviations();
    update_scales(a, ea, n.column_std, columns);
    n.divide(ea, er);
    n.row_deviations();
    update_scales(r, er, n.row_std, rows);
    n.divide(ea, er);
    const float now = n.imbalance();
    if (now <= best) {
      best = now;
      keep(ea, sc, columns);
      keep(er, sr, rows);
    }
  }

  n.divide(sc, sr);
  const F qmax = set(static_cast<float>((1 << bits) - 1));
  for (int i = 0; i < rows; i += 16) {
    F lo = load(work + i), hi = lo;
    for (int j = 1; j < columns; ++j) {
      lo = min(lo, load(work + j * rows + i));
      hi = max(hi, load(work + j * rows + i));
    }
    const F s = max((hi - lo) / qmax, set(1e-10f)), scale = load(sr + i);
    for (int j = 0; j < columns; ++j) {
      const F code = rint(clamp((load(work + j * rows + i) - lo) / s, set(0.0f), qmax));
      store_lanes_u8(out.codes + j * rows + i, to_int(code));
    }
    store(out.s + i, round_f16(scale * s));
    store(out.z + i, round_f16(scale * lo));
  }
  for (int j = 0; j < columns; j += 16) store(out.c + j, round_f16(load(sc + j)));
}

}  // namespace kvarn::KVARN_CPU
