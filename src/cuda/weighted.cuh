// SPDX-License-Identifier: Apache-2.0
// The encoder `weighted` (specification section 6) for one tile of K or V and one CTA. Bit-equal to
// codec/weighted.cpp.
//
// About 140 operations an element, of which the refits take 30: three row phases and two column phases, with a barrier
// after each.
#pragma once

#include "cuda/encode_norms.cuh"
#include "cuda/encode_refit.cuh"
#include "cuda/feedback.cuh"
#include "cuda/lifted.cuh"

namespace kvarn::cuda {

template <class Shape, class Memory>
struct Weighted {
  using Rows = typename Shape::Rows;
  static constexpr bool kKeys = Shape::side == Side::kKeys;
  static constexpr int kHeld = Rows::held;
  Memory& memory;

  // A row in the registers of its lanes.
  struct Held {
    Real x[kHeld];
    const Real* weights;  // of the lane's columns, in shared memory: the row has the registers
    __device__ Real w(int i) const { return weights[Rows::held_word(i)]; }
    Real sw, sw_inverse, sx;  // SUM w, of all rows the same, and SUM w*x
    Real s, z;                // s lifted
  };

  // The norms of V's tokens must be there, for K those of its own too.
  __device__ void prepare() const {
    const int i = threadIdx.x;
    const Real rv =
        i < Shape::tokens ? mean_norm<Shape::tokens>(memory.v_norm) / larger(memory.v_norm[i], kTiny) : 0.0f;
    if constexpr (kKeys) {
      token_norm<Shape>(memory.k_norm, memory.column);
      if (i < Shape::columns) {
        set_column<Shape>(memory, i, memory.column[i]);
        const Real rk = mean_norm<Shape::tokens>(memory.k_norm) / larger(memory.k_norm[i], kTiny);
        memory.column_weight[Rows::word(i)] = key_weight(rk, rv);
      }
    } else {
      if (i < Shape::tokens) memory.row[i].weight = value_weight(rv);
      if (i < Shape::columns) set_column<Shape>(memory, i, 1.0f);
    }
  }

  // kUnit: every c is 1, and so is V's every weight.
  template <bool kUnit>
  __device__ void load(const Rows& at, int first, Held& r) const {
    at.load_all(memory.values, first, r.x);
    if constexpr (!kUnit) {
      const Real* inverse = memory.column_inverse + at.lane * Rows::lane_words;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) r.x[i] = r.x[i] * inverse[Rows::held_word(i)];
    }
    r.sx = Rows::sum([&](int i) { return kUnit ? r.x[i] : r.w(i) * r.x[i]; });
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
    Rows::range(r.x, low, high);
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
    const auto total = Rows::sums([&](int i) {
      const Real x = r.x[i], t = code(x, z, inverse), wq = kUnit ? t - Real(1.0f) : times_code(t, r.w(i));
      if constexpr (kWithError) {
        const Real e = times_code(t, s) + z - x;
        return Sums<4>{{wq, times_code(t, wq), wq * x, (kUnit ? e : r.w(i) * e) * e}};
      } else {
        return Sums<3>{{wq, times_code(t, wq), wq * x}};
      }
    });
    const Real sw = r.sw, sx = r.sx, sq = total.of[0], sqq = total.of[1], sqx = total.of[2];
    const Real det = sw * sqq - sq * sq, better = quotient(sw * sqx - sq * sx, det);
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
    return Rows::sum([&](int i) {
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

  __device__ void keep_grid(const Rows& at, int row, const Held& r) const {
    __syncwarp();  // all lanes have read the grid before
    if (at.lane != 0) return;
    memory.row[row].s = r.s, memory.row[row].z = r.z, memory.row[row].inverse = lifted_inverse(r.s);
  }

  // y: what the codes read back.
  __device__ static void debias(Held& r, const Real (&y)[kHeld]) {
    const Divisor sw(r.sw, r.sw_inverse);
    const Real mx = r.sx / sw, my = Rows::sum([&](int i) { return r.w(i) * y[i]; }) / sw;
    const auto square = Rows::sums([&](int i) {
      const Real dx = r.x[i] - mx, wdx = r.w(i) * dx;
      return Sums<2>{{wdx * dx, wdx * (y[i] - my)}};
    });
    const Real a = square.of[0], b = square.of[1];
    const Real g = b > Real(0.0f) ? clamp(a / b, .8f, 1.5f) : Real(1.0f);
    r.s = lifted_f16(r.s * g);
    r.z = f16(mx - (my - r.z) * g);
  }

  // sw: SUM w.
  template <bool kUnit, class Body>
  __device__ void for_rows(Real sw, const Body& body) const {
    const Rows at;
    Held r;
    r.weights = memory.column_weight + at.lane * Rows::lane_words;
    r.sw = sw, r.sw_inverse = reciprocal(sw);
    Rows::for_each([&](int first) {
      load<kUnit>(at, first, r);
      body(at, first + at.in_warp, r);
    });
  }

  // SUM w, by every warp for itself.
  __device__ Real column_weights() const {
    const int lane = threadIdx.x % 32;
    return warp_sum<Shape::columns>([&](int i) { return memory.column_weight[Rows::word(lane + 32 * i)]; });
  }

  // Each element's code takes the place of its value.
  __device__ void finish(const Rows& at, int row, Held& r, bool with_codes) const {
    r.s = lifted_f16(r.s), r.z = f16(r.z);
    const Real inverse = lifted_inverse(r.s);
    uint16_t* codes = reinterpret_cast<uint16_t*>(memory.values) + Shape::at(row, at.start());
    Real y[kHeld];
    __syncwarp();  // all lanes have their values
    if (with_codes) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const Real t = code(r.x[i], r.z, inverse);
        codes[Shape::at(0, Rows::step(i))] = code_bits(t);
        if (!kKeys) y[i] = times_code(t, r.s) + r.z;
      }
    }
    if constexpr (!kKeys) debias(r, y);
    keep_grid(at, row, r);
  }

  // Values in, codes and vectors out, s lifted; begins and ends with the caller's barriers. feedback: of K, or null.
  __device__ void encode(const float* feedback) const {
    prepare();
    __syncthreads();
    Real sw = kKeys ? column_weights() : Real(static_cast<float>(Shape::columns));
    for_rows<!kKeys>(sw, [&](const Rows& at, int row, Held& r) {
      start_and_solve<!kKeys>(r);
      keep_grid(at, row, r);
    });
#pragma unroll 1
    for (int round = 0; round < 2; ++round) {
      __syncthreads();
      refit_columns<Shape>(memory);
      __syncthreads();
      if (!kKeys) sw = column_weights();
      for_rows<false>(sw, [&](const Rows& at, int row, Held& r) {
        r.s = memory.row[row].s, r.z = memory.row[row].z;
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) solve<false, false>(r);
        if (round == 1)
          finish(at, row, r, feedback == nullptr);
        else
          keep_grid(at, row, r);
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
