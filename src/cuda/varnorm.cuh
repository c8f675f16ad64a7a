// SPDX-License-Identifier: Apache-2.0
// The encoder `varnorm` (specification section 7) for one tile of K or V and one CTA. Bit-equal to
// codec/varnorm.cpp, with its own logarithm and exponential.
//
// Operations an element: 45 in each of 8 iterations, most of them exact divisions. What is where: column_inverse e^a,
// column_weight 1/e^a, column sc, deviation the columns' std; Row {s e^r, z r, inverse 1/e^r, weight the row's std},
// row_best sr. Thread j keeps a[j] in a register.
#pragma once

#include "cuda/encode_tile.cuh"

namespace kvarn::cuda {

// x normal and positive.
__device__ inline Real natural_log(Real x) {
  const uint32_t bits = __float_as_uint(x.value);
  Real e = static_cast<float>(static_cast<int>(bits >> 23) - 127);
  Real u = __uint_as_float((bits & 0x7fffffu) | 0x3f800000u);
  if (u > Real(1.41421354f)) u = u * Real(.5f), e = e + Real(1.0f);
  const Real one = 1.0f, f = u - one, g = f / (Real(2.0f) + f), h = g * g;
  const Real series =
      one + h * (Real(0.333333343f) + h * (Real(0.2f) + h * (Real(0.142857149f) + h * Real(0.111111112f))));
  return e * Real(0.693147182f) + Real(2.0f) * g * series;
}

// |x| <= 80.
__device__ inline Real exponential(Real x) {
  const Real one = 1.0f, n = rintf((x * Real(1.44269502f)).value);
  const Real f = (x - n * Real(0.693359375f)) - n * Real(-2.12194440e-4f);
  const Real series =
      one +
      f * (one + f * (Real(.5f) +
                      f * (Real(0.166666672f) +
                           f * (Real(0.0416666679f) +
                                f * (Real(0.00833333377f) + f * (Real(0.00138888892f) + f * Real(1.98412701e-4f)))))));
  return series * Real(__uint_as_float(static_cast<uint32_t>(static_cast<int>(n.value) + 127) << 23));
}

// log_scale + ln(std), between the method's bounds.
__device__ inline Real updated(Real log_scale, Real std) {
  return clamp(log_scale + natural_log(clamp(std, 1e-3f, 1e3f)), -0.3f, 10.0f);
}

template <class Shape, class Memory>
struct Varnorm {
  static constexpr int kIterations = 8;
  using Rows = typename Shape::Rows;
  using Columns = typename Shape::Columns;
  static constexpr int kHeld = Rows::held;
  Memory& memory;

  // std of a line.
  template <class Of>
  __device__ static Real deviation(const Real (&x)[Of::held]) {
    const Real mean = Of::sum([&](int i) { return x[i]; }) / Real(static_cast<float>(Of::length));
    const Real squares = Of::sum([&](int i) { return (x[i] - mean) * (x[i] - mean); });
    return square_root(squares / Real(static_cast<float>(Of::length - 1)));
  }

  __device__ void set_column(int column, Real scale) const {
    memory.column_inverse[Rows::word(column)] = scale;
    memory.column_weight[Rows::word(column)] = reciprocal(scale);
  }
  __device__ void set_row(int row, Real scale, Real log_scale, Real std) const {
    memory.row[row] = {scale, log_scale, reciprocal(scale), std};
  }

  // m / (scale of its column), of a row.
  __device__ void load(const Rows& at, int first, Real (&y)[kHeld]) const {
    const Real *scale = memory.column_inverse + at.lane * Rows::lane_words,
               *inverse = memory.column_weight + at.lane * Rows::lane_words;
    at.load_all(memory.values, first, y);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) y[i] = y[i] / Divisor(scale[Rows::held_word(i)], inverse[Rows::held_word(i)]);
  }
  __device__ static void divide(const Real (&y)[kHeld], Real scale, Real (&x)[kHeld]) {
    const Divisor by(scale);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = y[i] / by;
  }

  template <class Body>
  __device__ void for_rows(const Body& body) const {
    const Rows at;
    Rows::for_each([&](int first) {
      Real y[kHeld];
      load(at, first, y);
      body(at, first + at.in_warp, y);
    });
  }

  // r and e^r from the present deviations of the rows, then the rows' std under them.
  __device__ void update_rows() const {
    for_rows([&](const Rows& at, int row, const Real(&y)[kHeld]) {
      const Row now = memory.row[row];
      __syncwarp();
      Real x[kHeld];
      divide(y, now.s, x);
      const Real log_scale = updated(now.z, deviation<Rows>(x)), scale = exponential(log_scale);
      divide(y, scale, x);
      const Real std = deviation<Rows>(x);
      if (at.lane == 0) set_row(row, scale, log_scale, std);
    });
  }

  __device__ void column_deviations() const {
    const Columns at;
    Columns::for_each([&](int first) {
      const int column = first + at.in_warp, word = Rows::word(column);
      const Divisor by(memory.column_inverse[word], memory.column_weight[word]);
      Real x[Columns::held];
      at.load_all(memory.values, first, x);
#pragma unroll
      for (int i = 0; i < Columns::held; ++i) {
        const Row& row = memory.row[at.start() + Columns::step(i)];
        x[i] = x[i] / by / Divisor(row.s, row.inverse);
      }
      const Real std = deviation<Columns>(x);
      if (at.lane == 0) memory.deviation[column] = std;
    });
  }

  // Highest over lowest of what the lanes hold.
  __device__ static Real spread(Real low, Real high) {
#pragma unroll
    for (int o = 16; o >= 1; o /= 2) {
      low = smaller(low, __shfl_xor_sync(0xffffffffu, low.value, o));
      high = larger(high, __shfl_xor_sync(0xffffffffu, high.value, o));
    }
    return high / larger(low, 1e-8f);
  }
  // By every warp for itself.
  __device__ Real imbalance() const {
    const int lane = threadIdx.x % 32;
    Real low = memory.deviation[lane], high = low, row_low = memory.row[lane].weight, row_high = row_low;
    for (int j = lane + 32; j < Shape::columns; j += 32)
      low = smaller(low, memory.deviation[j]), high = larger(high, memory.deviation[j]);
    for (int i = lane + 32; i < Shape::rows; i += 32)
      row_low = smaller(row_low, memory.row[i].weight), row_high = larger(row_high, memory.row[i].weight);
    return spread(low, high) + spread(row_low, row_high);
  }

  // Codes and grids from the best scales.
  __device__ void quantize() const {
    uint16_t* codes = reinterpret_cast<uint16_t*>(memory.values);
    for_rows([&](const Rows& at, int row, const Real(&y)[kHeld]) {
      Real x[kHeld], low, high;
      const Real scale = memory.row_best[row];
      divide(y, scale, x);
      Rows::range(x, low, high);
      const Real s = larger((high - low) / Real(Shape::qmax), 1e-10f);
      const Divisor by(s);
      __syncwarp();  // all lanes have their values
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        codes[Shape::at(row, at.start() + Rows::step(i))] = rounded_bits(clamp((x[i] - low) / by, 0.0f, Shape::qmax));
      if (at.lane == 0) memory.row[row].s = f16(scale * s), memory.row[row].z = f16(scale * low);
    });
  }

  // Values in, codes and vectors out; begins and ends with the caller's barriers.
  __device__ void encode() const {
    const int i = threadIdx.x;  // a column, and a row
    Real log_scale = 0.0f, scale = 1.0f;
    if (i < Shape::columns) set_column(i, scale), memory.column[i] = scale;
    if (i < Shape::rows) memory.row_best[i] = 1.0f;
    __syncthreads();
    for_rows([&](const Rows& at, int row, const Real(&y)[kHeld]) {
      const Real std = deviation<Rows>(y);
      if (at.lane == 0) set_row(row, 1.0f, 0.0f, std);
    });
    __syncthreads();
    column_deviations();
    __syncthreads();
    Real best = imbalance();
#pragma unroll 1
    for (int iteration = 0; iteration < kIterations; ++iteration) {
      if (i < Shape::columns) {
        log_scale = updated(log_scale, memory.deviation[i]);
        scale = exponential(log_scale);
        set_column(i, scale);
      }
      __syncthreads();
      update_rows();
      __syncthreads();
      column_deviations();
      __syncthreads();
      const Real now = imbalance();
      if (now <= best) {
        best = now;
        if (i < Shape::columns) memory.column[i] = scale;
        if (i < Shape::rows) memory.row_best[i] = memory.row[i].s;
      }
    }
    if (i < Shape::columns) {
      set_column(i, memory.column[i]);
      memory.column[i] = f16(memory.column[i]);
    }
    __syncthreads();
    quantize();
  }
};

}  // namespace kvarn::cuda
