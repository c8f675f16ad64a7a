// SPDX-License-Identifier: Apache-2.0
// rotate (specification section 2): butterflies inside a vector by lane exchange, across vectors by plain adds.
namespace kvarn::KVARN_CPU {

template <int h>
KVARN_INLINE F butterfly(F x) {
  return exchange<h>(x) + negate<h>(x);  // lane without bit h: x + partner; with it: partner - x
}

KVARN_INLINE void rotate_block(F* x, int vectors) {
  for (int i = 0; i < vectors; ++i) x[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(x[i]))));
  for (int h = 1; h < vectors; h *= 2)
    for (int i = 0; i < vectors; ++i)
      if ((i & h) == 0) {
        const F a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
  // 1 / sqrt(16 vectors), rounded to nearest
  const float scale = vectors == 1   ? .25f
                      : vectors == 2 ? 0.176776695f
                      : vectors == 4 ? .125f
                      : vectors == 8 ? 0.0883883476f
                                     : .0625f;
  for (int i = 0; i < vectors; ++i) x[i] = x[i] * set(scale);
}

// x [head_dim / 16] in place.
static void rotate_vectors(F* x, int head_dim) {
  for (int start = 0, vectors = head_dim / 16; start < vectors;) {
    int block = 1;
    while (2 * block <= vectors - start) block *= 2;
    rotate_block(x + start, block);
    start += block;
  }
}

static int64_t rotate_raw(const void* in, kvarn_dtype dtype, int head_dim, const float* balance, uint16_t* out) {
  F x[16];
  int kept = 0;
  for (int i = 0; i < head_dim / 16; ++i) {
    const F given = load_any(in, dtype, 16 * i), raw = balance != nullptr ? given / load(balance + 16 * i) : given;
    kept += count(less(abs(raw), set(65504.0039f)));  // the next float: |x| <= 65504
    x[i] = select(ordered(raw), f16_range(raw), set(0.0f));
  }
  rotate_vectors(x, head_dim);
  const F vanishing = set(0x1p-25f);  // rounds to a zero, which must not keep its sign
  for (int i = 0; i < head_dim / 16; ++i)
    store_f16(out + 16 * i, select(less(vanishing, abs(x[i])), f16_range(x[i]), set(0.0f)));
  return head_dim - kept;
}

static void rotate(const void* in, kvarn_dtype in_dtype, int head_dim, void* out, kvarn_dtype out_dtype) {
  F x[16];
  for (int i = 0; i < head_dim / 16; ++i) x[i] = load_any(in, in_dtype, 16 * i);
  rotate_vectors(x, head_dim);
  for (int i = 0; i < head_dim / 16; ++i) store_any(x[i], out, out_dtype, 16 * i);
}

static bool load_query(const void* in, kvarn_dtype dtype, int head_dim, const float* balance, float factor, float* q) {
  F x[16];
  for (int i = 0; i < head_dim / 16; ++i) {
    x[i] = load_any(in, dtype, 16 * i);
    if (balance != nullptr) x[i] = x[i] * load(balance + 16 * i);
  }
  rotate_vectors(x, head_dim);
  int finite = 0;
  for (int i = 0; i < head_dim / 16; ++i) {
    x[i] = x[i] * set(factor);
    finite += count(less(abs(x[i]), set(3e38f)));
    store(q + 16 * i, x[i]);
  }
  return finite == head_dim;
}

static void store_row(const float* in, int length, void* out, kvarn_dtype dtype) {
  for (int i = 0; i < length; i += 16) store_any(load(in + i), out, dtype, i);
}

}  // namespace kvarn::KVARN_CPU
