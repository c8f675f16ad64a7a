// SPDX-License-Identifier: Apache-2.0
// The running softmax of one column.
namespace kvarn::KVARN_CPU {

// cap * tanh(y / cap) in log2 units; tanh(x) = 1 - 2 / (e^2x + 1), through e^-2|x| so that nothing overflows.
KVARN_INLINE F soft_cap(F y, float cap) {
  const F x = y / set(cap), e = exp2_negative(abs(x) * set(-2.88539008f));
  const F magnitude = set(cap) * (set(1.0f) - e) / (set(1.0f) + e);
  return select(less(y, set(0.0f)), set(0.0f) - magnitude, magnitude);
}

// Scores of one column -> weights p = 2^(y - max) in place; the running maximum and sum move on. Returns the factor by
// which what the column has summed so far shrinks. n is a multiple of 16; scores beyond the last token are
// Columns::kLowest * 1.1.
KVARN_INLINE float softmax_step(float* scores, int n, float& running_max, float& running_sum) {
  F top = set(running_max);
  for (int t = 0; t < n; t += 16) top = max(load(scores + t), top);
  const float now = max_lanes(top), decay = exp2_negative(running_max - now);
  F total = set(0.0f);
  for (int t = 0; t < n; t += 16) {
    const F p = exp2_negative(load(scores + t) - set(now));
    store(scores + t, p);
    total = total + p;
  }
  running_sum = running_sum * decay + sum_lanes(total);
  running_max = now;
  return decay;
}

}  // namespace kvarn::KVARN_CPU
