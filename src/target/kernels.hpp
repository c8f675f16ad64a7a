// SPDX-License-Identifier: Apache-2.0
// What a target (scalar, AVX2, AVX-512) provides: the tile-level verbs that the life cycle in pages/ is made of.
// A table of plain functions; none allocates, throws or checks its arguments.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/presets.hpp"
#include "kvarn/kvarn.h"

namespace kvarn {

inline constexpr int kTileValues = format::kMaxPageTokens * format::kMaxHeadDim;
inline constexpr int kMaxColumns = 64;  // of one unit of attention: rows x query heads of one KV head

// The raw tokens of one tile and KV head, f16 rotated, each [head_dim]. They may be scattered over pages and workspace.
struct RawTile {
  const uint16_t* k[format::kMaxPageTokens];
  const uint16_t* v[format::kMaxPageTokens];
};

// The running softmax of a few columns (query row x head), a chain over tiles: out / sum is the result, in units of
// 2^max.
struct Columns {
  int count;
  float* q;    // [count][head_dim] rotated, times scale * log2(e)
  float* out;  // [count][head_dim]
  float* max;  // [count] in log2 units; kLowest when empty
  float* sum;  // [count]

  void reset(int head_dim) const {
    for (int i = 0; i < count * head_dim; ++i) out[i] = 0;
    for (int i = 0; i < count; ++i) max[i] = kLowest, sum[i] = 0;
  }
  static constexpr float kLowest = -3e38f;
};

// Memory of one thread.
struct alignas(64) Scratch {
  // Of the kernels: a tile of K and of V in floats, one more for the encoder, and their codes.
  float k[kTileValues], v[kTileValues], work[kTileValues];
  uint8_t k_codes[kTileValues], v_codes[kTileValues];
  // Of the life cycle: the columns of one unit.
  float q[kMaxColumns * format::kMaxHeadDim], out[kMaxColumns * format::kMaxHeadDim],
      total[kMaxColumns * format::kMaxHeadDim];
  float state[4][kMaxColumns];
};

struct Kernels {
  const char* name;

  // One vector of K or V: divide by balance (null, or [head_dim]), sanitize, rotate, round. Returns how many elements
  // were replaced.
  int64_t (*rotate_raw)(const void* in, kvarn_dtype dtype, int head_dim, const float* balance, uint16_t* out);
  // One vector, any dtype to any dtype.
  void (*rotate)(const void* in, kvarn_dtype in_dtype, int head_dim, void* out, kvarn_dtype out_dtype);
  // One query: times balance (null, or [head_dim]), rotated, times factor. Returns whether all of it is finite.
  bool (*load_query)(const void* in, kvarn_dtype dtype, int head_dim, const float* balance, float factor, float* q);
  void (*store)(const float* in, int count, void* out, kvarn_dtype dtype);

  // feedback: null, or [head_dim][head_dim] of this KV head.
  void (*encode)(const kvarn_layout& layout, kvarn_encoder encoder, const float* feedback, const RawTile& raw,
                 uint8_t* record, Scratch& scratch);
  // k, v [page_tokens][head_dim]; may be scratch.k and scratch.v
  void (*expand)(const kvarn_layout& layout, const uint8_t* record, float* k, float* v, Scratch& scratch);

  // Extends each column's chain by a packed tile, or by the tokens of a raw tile that it sees (visible[column] >= 1).
  // `next` is the record that follows, to be fetched meanwhile; the last one names itself.
  void (*attend_packed)(const kvarn_layout& layout, const uint8_t* record, const uint8_t* next, const Columns& columns,
                        float cap, Scratch& scratch);
  void (*attend_raw)(const kvarn_layout& layout, const RawTile& raw, const int32_t* visible, const Columns& columns,
                     float cap, Scratch& scratch);
  // total = total followed by part.
  void (*fold)(int head_dim, const Columns& total, const Columns& part);
  // out / sum, rotated back.
  void (*finish)(const Columns& columns, int column, int head_dim, void* out, kvarn_dtype dtype);
};

// The compiled targets; null where the CPU or the build lacks one.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace kvarn
