// SPDX-License-Identifier: Apache-2.0
// The running softmax of a few columns, and how one follows another.
//
// A column's state is (m, l, O): weights are in units of 2^m with m an integer, so that changing the unit is exact and
// only the order of the additions decides the bits. That order is fixed: tiles in a piece, pieces in a group, groups in a
// chapter, chapters in the segment (docs/kernels.md). Folding an empty state (m = kEmpty, zeros) changes nothing.
//
// Lane 4 g + i holds of n-tile nt the column 4 nt + i: channels 16 T + 2 g and + 1 for T = 0, 1, ..; m and l are the
// same in all g.
#pragma once

#include "cuda/machine.cuh"

namespace kvarn::cuda {

inline constexpr float kEmpty = -1e30f;

template <int kHeadDim, int kTiles>
struct State {
  float m[kTiles], l[kTiles];
  float out[kTiles][kHeadDim / 8];  // [T][2]

  __device__ void clear() {
#pragma unroll
    for (int nt = 0; nt < kTiles; ++nt) {
      m[nt] = kEmpty;
      l[nt] = 0;
#pragma unroll
      for (float& x : out[nt]) x = 0;
    }
  }
};

// A state in memory: [kTiles][D / 32][lane] of 16 bytes (two T's), then m and l of the columns.
template <int kHeadDim, int kTiles>
struct StoredState {
  float4 out[kTiles][kHeadDim / 32][32];
  float m[4 * kTiles], l[4 * kTiles];

  __device__ void store(const State<kHeadDim, kTiles>& s, int lane) {
#pragma unroll
    for (int nt = 0; nt < kTiles; ++nt) {
#pragma unroll
      for (int q = 0; q < kHeadDim / 32; ++q) {
        const float* x = s.out[nt] + 4 * q;
        out[nt][q][lane] = make_float4(x[0], x[1], x[2], x[3]);
      }
      if (lane < 4) m[4 * nt + lane] = s.m[nt], l[4 * nt + lane] = s.l[nt];
    }
  }
  // Channel d of the lane's column, for a writer that holds other channels.
  __device__ float& at(int nt, int d, int i) {
    const int tile = d / 16, lane = 4 * (d % 16 / 2) + i;
    return reinterpret_cast<float*>(&out[nt][tile / 2][lane])[2 * (tile % 2) + d % 2];
  }
  __device__ void copy(const StoredState& from, int lane) {
    for (int nt = 0; nt < kTiles; ++nt) {
      for (int q = 0; q < kHeadDim / 32; ++q) out[nt][q][lane] = from.out[nt][q][lane];
      if (lane < 4) m[4 * nt + lane] = from.m[4 * nt + lane], l[4 * nt + lane] = from.l[4 * nt + lane];
    }
  }
  __device__ void clear(int lane) {
    for (int nt = 0; nt < kTiles; ++nt) {
      for (int q = 0; q < kHeadDim / 32; ++q) out[nt][q][lane] = make_float4(0, 0, 0, 0);
      if (lane < 4) m[4 * nt + lane] = kEmpty, l[4 * nt + lane] = 0;
    }
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
template <int kHeadDim, int kTiles>
__device__ void fold(StoredState<kHeadDim, kTiles>& total, const StoredState<kHeadDim, kTiles>& part, int lane) {
  for (int nt = 0; nt < kTiles; ++nt) {
    const int column = 4 * nt + (lane & 3);
    const FoldFactors f = fold_factors(total.m[column], part.m[column]);
    const float l = fold_value(total.l[column], part.l[column], f);
#pragma unroll
    for (int q = 0; q < kHeadDim / 32; ++q) {
      const float4 x = total.out[nt][q][lane], y = part.out[nt][q][lane];
      total.out[nt][q][lane] = make_float4(fold_value(x.x, y.x, f), fold_value(x.y, y.y, f), fold_value(x.z, y.z, f),
                                           fold_value(x.w, y.w, f));
    }
    __syncwarp();
    if (lane < 4) total.m[column] = f.m, total.l[column] = l;
  }
  __syncwarp();
}

}  // namespace kvarn::cuda
