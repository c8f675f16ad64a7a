// SPDX-License-Identifier: Apache-2.0
// The running softmax of a few columns, and how one follows another.
//
// A column's state is (m, l, O): weights are in units of 2^m with m an integer, so that changing the unit is exact and
// only the order of the additions decides the bits. That order is fixed: steps (tiles) in a piece, pieces in a group, groups
// in a chapter, chapters in the segment (docs/kernels.md), each by fold_value, in registers or in memory. Folding an empty state (m = kEmpty, zeros) changes nothing.
//
// A warp has four columns. Lane 4 g + i holds of column i the channels 16 T + 2 g and + 1 for T = 0, 1, ..; m and l are
// the same in all g.
#pragma once

#include "cuda/machine.cuh"

namespace kvarn::cuda {

inline constexpr float kEmpty = -1e30f;
inline constexpr int kWarpColumns = 4;

template <int kHeadDim>
struct State {
  float m, l;
  float out[kHeadDim / 8];  // [T][2]

  __device__ void clear() {
    m = kEmpty, l = 0;
#pragma unroll
    for (float& x : out) x = 0;
  }
};

// A state in memory: [D / 32][lane] of 16 bytes (two T's), then m and l of the columns.
template <int kHeadDim>
struct StoredState {
  float4 out[kHeadDim / 32][32];
  float m[kWarpColumns], l[kWarpColumns];

  __device__ void store(const State<kHeadDim>& s, int lane) {
#pragma unroll
    for (int q = 0; q < kHeadDim / 32; ++q) {
      const float* x = s.out + 4 * q;
      out[q][lane] = make_float4(x[0], x[1], x[2], x[3]);
    }
    if (lane < kWarpColumns) m[lane] = s.m, l[lane] = s.l;
  }
  // Channel d of column i, for a writer that holds other channels.
  __device__ float& at(int d, int i) {
    const int tile = d / 16, lane = 4 * (d % 16 / 2) + i;
    return reinterpret_cast<float*>(&out[tile / 2][lane])[2 * (tile % 2) + d % 2];
  }
  __device__ void copy(const StoredState& from, int lane) {
#pragma unroll
    for (int q = 0; q < kHeadDim / 32; ++q) out[q][lane] = from.out[q][lane];
    if (lane < kWarpColumns) m[lane] = from.m[lane], l[lane] = from.l[lane];
  }
  __device__ void clear(int lane) {
#pragma unroll
    for (int q = 0; q < kHeadDim / 32; ++q) out[q][lane] = make_float4(0, 0, 0, 0);
    if (lane < kWarpColumns) m[lane] = kEmpty, l[lane] = 0;
  }
};

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

// total = total followed by part, by one warp.
template <int kHeadDim>
__device__ inline void fold(StoredState<kHeadDim>& total, const StoredState<kHeadDim>& part, int lane) {
  const int column = lane & 3;
  float4 x[kHeadDim / 32], y[kHeadDim / 32];  // all read before any is written: the compiler cannot know that they differ
#pragma unroll
  for (int q = 0; q < kHeadDim / 32; ++q) x[q] = total.out[q][lane], y[q] = part.out[q][lane];
  const FoldFactors f = fold_factors(total.m[column], part.m[column]);
  const float l = fold_value(total.l[column], part.l[column], f);
  __syncwarp();
#pragma unroll
  for (int q = 0; q < kHeadDim / 32; ++q)
    total.out[q][lane] = make_float4(fold_value(x[q].x, y[q].x, f), fold_value(x[q].y, y[q].y, f),
                                     fold_value(x[q].z, y[q].z, f), fold_value(x[q].w, y[q].w, f));
  if (lane < kWarpColumns) total.m[column] = f.m, total.l[column] = l;
  __syncwarp();
}

}  // namespace kvarn::cuda
