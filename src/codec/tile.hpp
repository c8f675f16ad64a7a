// SPDX-License-Identifier: Apache-2.0
// One tile of K or V as the encoders see it: rows carry (s, z), columns carry c (specification section 6).
#pragma once

#include "format/float16.hpp"
#include "format/presets.hpp"
#include "target/kernels.hpp"

namespace kvarn::codec {

enum class Side { kKeys, kValues };

// x(i, j), row i, column j. K: rows are channels, columns tokens. V: rows are tokens, columns channels.
struct Tile {
  Side side;
  int rows, columns, bits;
  const float* values;  // [token][channel]
  float qmax() const { return static_cast<float>((1 << bits) - 1); }
  float operator()(int i, int j) const { return side == Side::kKeys ? values[j * rows + i] : values[i * columns + j]; }
};

// What an encoder decides: the stored vectors, and the code of every element.
struct Encoded {
  float s[format::kMaxHeadDim], z[format::kMaxHeadDim];  // per row
  float c[format::kMaxHeadDim];                          // per column
  uint8_t* codes;                                        // [column][row]: the code matrix of section 4
  uint8_t& code(const Tile& tile, int i, int j) const { return codes[j * tile.rows + i]; }
};

inline float f16(float value) { return format::f16_to_float(format::float_to_f16_saturating(value)); }
inline float smaller(float a, float b) { return a < b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }
inline float clamp(float x, float low, float high) { return smaller(larger(x, low), high); }

// The importance of tokens, from the norms of a K and V tile: section 6.
struct TokenWeights {
  float nk[format::kMaxPageTokens], wk[format::kMaxPageTokens], wv[format::kMaxPageTokens];
};
TokenWeights token_weights(const float* k, const float* v, int tokens, int head_dim);

void weighted(const Tile& tile, const TokenWeights& weights, Encoded& out);  // section 6
// K's codes anew, with the errors of later channels fed back through b [channel][channel]; the grid is weighted's.
void feed_back(const Tile& k, const float* b, Encoded& grid);
void varnorm(const Tile& tile, Encoded& out, float* scratch);  // section 7; scratch [rows * columns]

// codes [rows][columns] to and from the fragment order of section 4.
void pack(const uint8_t* codes, int rows, int columns, int bits, uint8_t* out);
void unpack(const uint8_t* in, int rows, int columns, int bits, uint8_t* codes);

}  // namespace kvarn::codec
