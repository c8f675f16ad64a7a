// SPDX-License-Identifier: Apache-2.0
// The running softmax of a few columns, and how one follows another.
//
// A column's state is (m, l, O): weights are in units of 2^m with m an integer, so that changing the unit is exact and
// only the order of the additions decides the bits. That order is fixed (attend_order.cuh), each by fold_value, in
// registers or in memory. Folding an empty state (m = kEmpty, zeros) changes nothing.
//
// A state is of a quad. Lane 4 g + i holds of column i the channels 16 T + 2 g and + 1 for T = 0, 1, ..; m and l are
// the same in all g.
#pragma once

#include "cuda/machine.cuh"
#include "cuda/plan.hpp"

namespace kvarn::cuda {

inline constexpr float kEmpty = -1e30f;

// Of a warp's kQuads quads, the column of which a lane of rows g makes the right operand of an MMA.
template <int kQuads>
__device__ inline int query_column(int g) {
  return kQuads == 1 ? g >> 1 : (g >> 1) + kQuadColumns * (g & 1);
}
// Of a column: the unit of its query in shared memory, a power of two; its token's position, and the first token that
// it sees.
struct alignas(16) QueryColumn {
  float up;
  int32_t position, low;
};
// The queries of a quad, f32 [4][query_stride]: a stride of 4 more than the channels, so that lanes that read the same
// channels of columns c and c + 4 touch different banks.
constexpr int query_stride(int head_dim) { return head_dim + 4; }
constexpr int query_bytes(int head_dim) { return 4 * kQuadColumns * query_stride(head_dim); }

// kSlices: of 32 channels each; a warp that computes has all of them.
template <int kSlices>
struct State {
  float m, l;
  float out[4 * kSlices];  // [T][2]

  __device__ void clear() {
    m = kEmpty, l = 0;
#pragma unroll
    for (float& x : out) x = 0;
  }
};
template <int kHeadDim>
using FullState = State<kHeadDim / 32>;

// A slice in memory: of every lane two T's, and its own copy of the columns' m and l, so that warps that fold different
// slices of a state need not know of each other.
struct Slice {
  float4 out[32];
  float m[kQuadColumns], l[kQuadColumns];
};
// A slice that waits for those of other CTAs, and the ranks before and behind it.
struct alignas(16) PartSlice {
  Slice slice;
  int4 ranks;  // x, y
};
template <int kHeadDim>
struct StoredState {
  Slice slices[kHeadDim / 32];

  // Channel d of column i, for a writer that holds other channels.
  __device__ float& at(unsigned d, unsigned i) {
    const unsigned tile = d / 16, lane = 4 * (d % 16 / 2) + i;
    return reinterpret_cast<float*>(&slices[tile / 2].out[lane])[2 * (tile % 2) + d % 2];
  }
  // How many floats channel d + more lies behind channel d: `more` a multiple of 32, or of 8 if d < 8.
  static constexpr int distance(int more) {
    return more / 32 * static_cast<int>(sizeof(Slice) / 4) + 2 * (more / 16 % 2) + more % 16 / 8 * 64;
  }
};

template <int kSlices>
__device__ inline void store_state(const State<kSlices>& s, Slice* to, int lane) {
#pragma unroll
  for (int q = 0; q < kSlices; ++q) {
    const float* x = s.out + 4 * q;
    to[q].out[lane] = make_float4(x[0], x[1], x[2], x[3]);
    if (lane < kQuadColumns) to[q].m[lane] = s.m, to[q].l[lane] = s.l;
  }
}
template <int kSlices>
__device__ inline void load_state(State<kSlices>& s, const Slice* from, int lane) {
#pragma unroll
  for (int q = 0; q < kSlices; ++q) {
    const float4 y = from[q].out[lane];
    float* x = s.out + 4 * q;
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  }
  s.m = from->m[lane & 3], s.l = from->l[lane & 3];
}

struct FoldFactors {
  float m, a, b;  // the common unit; what the earlier and the later state are multiplied by
};
__device__ inline FoldFactors fold_factors(float earlier, float later) {
  const float m = fmaxf(earlier, later);
  return {m, power_of_two(earlier - m), power_of_two(later - m)};
}
__device__ inline float fold_value(float earlier, float later, const FoldFactors& f) {
  // earlier * a is exact; + 0 keeps it from becoming -0, so that an empty state on either side changes nothing
  return __fmaf_rn(later, f.b, __fmaf_rn(earlier, f.a, 0.0f));
}

// to = earlier followed by later; `to` may be either.
template <int kSlices>
__device__ inline void fold(const State<kSlices>& earlier, const State<kSlices>& later, State<kSlices>& to) {
  const FoldFactors f = fold_factors(earlier.m, later.m);
  to.m = f.m;
  to.l = fold_value(earlier.l, later.l, f);
#pragma unroll
  for (int i = 0; i < 4 * kSlices; ++i) to.out[i] = fold_value(earlier.out[i], later.out[i], f);
}

}  // namespace kvarn::cuda
