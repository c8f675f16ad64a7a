// SPDX-License-Identifier: Apache-2.0
// The column phase of the encoder `weighted`: what belongs to a column, and its refit to the rows' grids
// (specification section 6, step 2).
#pragma once

#include "cuda/encode_tile.cuh"
#include "cuda/lifted.cuh"

namespace kvarn::cuda {

template <class Shape, class Memory>
__device__ inline void set_column(Memory& memory, int column, Real c) {
  memory.column[column] = c;
  memory.column_inverse[Shape::Rows::word(column)] = reciprocal(c);
  if (Shape::side == Side::kValues) memory.column_weight[Shape::Rows::word(column)] = c * c;
}

// Two columns at a time, so that what is read of the rows serves both. A lane's partial sums grow by a group of rows
// after the other, which keeps the code short.
template <class Shape, class Memory>
__device__ inline void refit_columns(Memory& memory) {
  using Columns = typename Shape::Columns;
  constexpr bool kKeys = Shape::side == Side::kKeys;
  constexpr int kJoint = Columns::count > Columns::at_once ? 2 : 1, kStep = kJoint * Columns::at_once;
  const Columns at;
  Columns::template for_each<kStep>([&](int first) {
    int column[kJoint];
    const __half* matrices[kJoint];
    Real inverse[kJoint], c[kJoint];
#pragma unroll
    for (int j = 0; j < kJoint; ++j) {
      int line = first + j * Columns::at_once;
      if (Columns::count % kStep != 0 && line >= Columns::count) line = first;
      column[j] = line + at.in_warp;
      matrices[j] = at.matrices(memory.values, line);
      inverse[j] = memory.column_inverse[Shape::Rows::word(column[j])];
      c[j] = memory.column[column[j]];
    }
    Sums<2 * kJoint> s[Columns::partials];
#pragma unroll
    for (auto& sum : s)
#pragma unroll
      for (Real& x : sum.of) x = -0.0f;  // what changes nothing that is added
    const Row* rows = memory.row + at.start();
#pragma unroll 1
    for (int group = 0; group < Columns::length / Columns::group; ++group) {
      Real m[kJoint][8];
#pragma unroll
      for (int j = 0; j < kJoint; ++j) Columns::load(matrices[j] + group * Columns::group_halves, m[j]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Row grid = rows[group * Columns::group + Columns::step(i)];
        auto& sum = s[i % Columns::partials];
#pragma unroll
        for (int j = 0; j < kJoint; ++j) {
          const Real x = m[j][i] * inverse[j];
          const Real y = times_code(lifted_code<Shape::qmax>(x, grid.z, grid.inverse), grid.s) + grid.z;
          sum.of[2 * j] = sum.of[2 * j] + (kKeys ? m[j][i] * y : grid.weight * m[j][i] * y);
          sum.of[2 * j + 1] = sum.of[2 * j + 1] + (kKeys ? y * y : grid.weight * y * y);
        }
      }
    }
    const auto total = Columns::fold([&](int i) { return s[i]; });
    __syncwarp();  // all lanes have read what the first one writes
    if (at.lane == 0) {
#pragma unroll
      for (int j = 0; j < kJoint; ++j) {
        const Real ratio = total.of[2 * j] / total.of[2 * j + 1];
        if (Real(.25f) * c[j] < ratio && ratio < Real(4.0f) * c[j]) set_column<Shape>(memory, column[j], f16(ratio));
      }
    }
  });
}

}  // namespace kvarn::cuda
