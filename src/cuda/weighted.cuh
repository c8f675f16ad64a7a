// SPDX-License-Identifier: Apache-2.0
// The encoder `weighted` (specification section 6) for one tile of K or V and one CTA. Bit-equal to
// codec/weighted.cpp.
//
// About 140 operations an element, of which the refits take 30: three row phases and two column phases, with a barrier
// after each.
#pragma once

#include "cuda/encode_norms.cuh"
#include "cuda/feedback.cuh"
#include "cuda/lifted.cuh"

namespace kvarn::cuda {

template <class Shape, class Memory>
struct Weighted {
  static constexpr bool kKeys = Shape::side == Side::kKeys;
  static constexpr int kHeld = Shape::held;
  Memory& memory;

  // A row in the registers of its lanes.
  struct Held {
    Real x[kHeld];
    const Real* weights;  // of the lane's columns, in shared memory: the row has the registers
    __device__ Real w(int i) const { return weights[Shape::held_word(i)]; }
    Real sw, sw_inverse, sx;  // SUM w, SUM w*x
    Real s, z;                // s lifted
  };

  __device__ void set_column(int column, Real c) const {
    memory.column[column] = c;
    memory.column_inverse[Shape::column_word(column)] = reciprocal(c);
    if (!kKeys) memory.column_weight[Shape::column_word(column)] = c * c;
  }

  // The norms of V's tokens must be there, for K those of its own too.
  __device__ void prepare() const {
    const int i = threadIdx.x;
    const Real rv =
        i < Shape::tokens ? mean_norm<Shape::tokens>(memory.v_norm) / larger(memory.v_norm[i], kTiny) : 0.0f;
    if constexpr (kKeys) {
      token_norm<Shape>(memory.k_norm, memory.column);
      if (i < Shape::columns) {
        set_column(i, memory.column[i]);
        const Real rk = mean_norm<Shape::tokens>(memory.k_norm) / larger(memory.k_norm[i], kTiny);
        memory.column_weight[Shape::column_word(i)] = key_weight(rk, rv);
      }
    } else {
      if (i < Shape::tokens) memory.row[i].weight = value_weight(rv);
      if (i < Shape::columns) set_column(i, 1.0f);
    }
  }

  // kUnit: every c is 1, and so is V's every weight.
  template <bool kUnit>
  __device__ void load(int row, int q, Held& r) const {
    load_row<Shape>(memory.values, row, q, r.x);
    if constexpr (!kUnit) {
      Real inverse[kHeld];
      load_columns<Shape>(memory.column_inverse, q, inverse);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) r.x[i] = r.x[i] * inverse[i];
    }
    if constexpr (kUnit) {
      r.sw = static_cast<float>(Shape::columns);
      r.sx = row_sum<Shape>([&](int i) { return r.x[i]; });
    } else {
      r.weights = memory.column_weight + q * (kHeld + 4);
      const auto total = row_sums<Shape>([&](int i) { return Sums<2>{{r.w(i), r.w(i) * r.x[i]}}; });
      r.sw = total.of[0], r.sx = total.of[1];
    }
    r.sw_inverse = reciprocal(r.sw);
  }

  __device__ static Real code(Real x, Real z, Real inverse) { return lifted_code<Shape::qmax>(x, z, inverse); }

  __device__ static void start(Held& r) {
    constexpr float kFraction = Shape::bits == 2   ? .65f
                                : kKeys            ? 1.0f
                                : Shape::bits == 3 ? .75f
                                : Shape::bits == 4 ? .9f
                                                   : 1.0f;
    const Real f = kFraction;
    Real low, high;
    range<Shape>(r.x, low, high);
    const Real width = high - low;
    constexpr float kMost = Shape::qmax;
    r.s = f * width / Divisor(kMost, 1.0f / kMost) * Real(kLift);
    r.z = (low + high) * Real(.5f) - f * width * Real(.5f);
  }

  // Also returns the error of the grid that it starts from, if asked for.
  template <bool kUnit, bool kWithError>
  __device__ static Real solve(Held& r) {
    asm volatile("" ::: "memory");  // weights are to be read anew, not kept in registers
    const Real s = r.s, z = r.z, inverse = lifted_inverse(s);
    const auto total = row_sums<Shape>([&](int i) {
      const Real x = r.x[i], t = code(x, z, inverse), wq = kUnit ? t - Real(1.0f) : times_code(t, r.w(i));
      if constexpr (kWithError) {
        const Real e = times_code(t, s) + z - x;
        return Sums<4>{{wq, times_code(t, wq), wq * x, (kUnit ? e : r.w(i) * e) * e}};
      } else {
        return Sums<3>{{wq, times_code(t, wq), wq * x}};
      }
    });
    const Real sw = r.sw, sx = r.sx, sq = total.of[0], sqq = total.of[1], sqx = total.of[2];
    const Real det = sw * sqq - sq * sq, better = (sw * sqx - sq * sx) / det;
    if (det > Real(1e-12f) * sw * sqq && better > Real(0.0f)) {
      r.s = better;
      r.z = (sx - better * sq) / Divisor(sw, r.sw_inverse);
    }
    if constexpr (kWithError) return total.of[3];
    return 0.0f;
  }

  template <bool kUnit>
  __device__ static Real error(const Held& r) {
    asm volatile("" ::: "memory");  // as in solve
    const Real inverse = lifted_inverse(r.s);
    return row_sum<Shape>([&](int i) {
      const Real e = times_code(code(r.x[i], r.z, inverse), r.s) + r.z - r.x[i];
      return (kUnit ? e : r.w(i) * e) * e;
    });
  }

  template <bool kUnit>
  __device__ static void start_and_solve(Held& r) {
    start(r);
    const Real s = r.s, z = r.z, before = solve<kUnit, true>(r);
    if (!(error<kUnit>(r) < before)) r.s = s, r.z = z;
  }

  __device__ void keep_grid(int row, int q, const Held& r) const {
    __syncwarp();  // all lanes have read the grid before
    if (q != 0) return;
    memory.row[row].s = r.s, memory.row[row].z = r.z, memory.row[row].inverse = lifted_inverse(r.s);
  }

  // Each element's code takes the place of its value.
  __device__ void write_codes(int row, int q, const Held& r) const {
    const Real inverse = lifted_inverse(r.s);
    uint16_t* codes = reinterpret_cast<uint16_t*>(memory.values);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) codes[Shape::at(row, q + Shape::lanes * i)] = code_bits(code(r.x[i], r.z, inverse));
  }

  __device__ static void debias(Held& r) {
    const Real s = r.s, z = r.z, inverse = lifted_inverse(s);
    const Divisor sw(r.sw, r.sw_inverse);
    const auto y = [&](int i) { return times_code(code(r.x[i], z, inverse), s) + z; };
    const Real mx = r.sx / sw, my = row_sum<Shape>([&](int i) { return r.w(i) * y(i); }) / sw;
    const auto square = row_sums<Shape>([&](int i) {
      const Real dx = r.x[i] - mx, wdx = r.w(i) * dx;
      return Sums<2>{{wdx * dx, wdx * (y(i) - my)}};
    });
    const Real a = square.of[0], b = square.of[1];
    const Real g = b > Real(0.0f) ? square_root(clamp(a / b, .8f, 1.5f)) : Real(1.0f);
    r.s = lifted_f16(s * g);
    r.z = f16(mx - (my - z) * g);
  }

  // Two columns at a time, so that what is read of the rows serves both.
  __device__ void refit_columns() const {
    constexpr int kJoint = Shape::columns > Shape::columns_at_once ? 2 : 1;
    const ColumnLane<Shape> at;
#pragma unroll 1
    for (int first = at.column; first < Shape::columns; first += kJoint * Shape::columns_at_once) {
      int column[kJoint];
      Real inverse[kJoint], c[kJoint];
#pragma unroll
      for (int j = 0; j < kJoint; ++j) {
        column[j] = first + j * Shape::columns_at_once;
        if (Shape::columns % (kJoint * Shape::columns_at_once) != 0 && column[j] >= Shape::columns) column[j] = first;
        inverse[j] = memory.column_inverse[Shape::column_word(column[j])];
        c[j] = memory.column[column[j]];
      }
      const auto total = column_sums<Shape>([&](int i) {
        const int row = at.p + Shape::row_lanes * i;
        const Row grid = memory.row[row];
        Sums<2 * kJoint> terms;
#pragma unroll
        for (int j = 0; j < kJoint; ++j) {
          const Real m = raw_value<Shape>(memory.values, row, column[j]);
          const Real y = times_code(code(m * inverse[j], grid.z, grid.inverse), grid.s) + grid.z;
          terms.of[2 * j] = kKeys ? m * y : grid.weight * m * y;
          terms.of[2 * j + 1] = kKeys ? y * y : grid.weight * y * y;
        }
        return terms;
      });
      __syncwarp();  // all lanes have read what lane 0 writes
      if (at.p != 0) continue;
#pragma unroll
      for (int j = 0; j < kJoint; ++j) {
        const Real ratio = total.of[2 * j] / total.of[2 * j + 1];
        if (Real(.25f) * c[j] < ratio && ratio < Real(4.0f) * c[j]) set_column(column[j], f16(ratio));
      }
    }
  }

  template <bool kUnit, class Body>
  __device__ void for_rows(const Body& body) const {
    const RowLane<Shape> at;
#pragma unroll 1
    for (int row = at.row; row < Shape::rows; row += Shape::rows_at_once) {
      Held r;
      load<kUnit>(row, at.q, r);
      body(row, at.q, r);
    }
  }

  __device__ void finish(int row, int q, Held& r, bool with_codes) const {
    r.s = lifted_f16(r.s), r.z = f16(r.z);
    if (with_codes) write_codes(row, q, r);
    if constexpr (!kKeys) debias(r);
    keep_grid(row, q, r);
  }

  // Values in, codes and vectors out, s lifted; begins and ends with the caller's barriers. feedback: of K, or null.
  __device__ void encode(const float* feedback) const {
    prepare();
    __syncthreads();
    for_rows<!kKeys>([&](int row, int q, Held& r) {
      start_and_solve<!kKeys>(r);
      keep_grid(row, q, r);
    });
#pragma unroll 1
    for (int round = 0; round < 2; ++round) {
      __syncthreads();
      refit_columns();
      __syncthreads();
      for_rows<false>([&](int row, int q, Held& r) {
        r.s = memory.row[row].s, r.z = memory.row[row].z;
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) solve<false, false>(r);
        if (round == 1)
          finish(row, q, r, feedback == nullptr);
        else
          keep_grid(row, q, r);
      });
    }
    if constexpr (kKeys) {
      if (feedback == nullptr) return;
      __syncthreads();
      Feedback<Shape, Memory>{memory, feedback}.run();
    }
  }
};

}  // namespace kvarn::cuda
