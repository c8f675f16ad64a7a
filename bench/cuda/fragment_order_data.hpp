// SPDX-License-Identifier: Apache-2.0
// Host side of fragment_order.cu: random tiles, their records in both orders, and the answers by double loops.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "format/fragment.hpp"
#include "fragment_order_mma.cuh"

struct Tile {
  uint8_t k[kTokens][kChannels], v[kChannels][kTokens];                                // codes, 4 and 2 bits
  float k_scale[kChannels], k_token[kTokens], v_channel[kChannels], v_scale[kTokens];  // exact in fp16
};

inline Tile random_tile(std::mt19937& random) {
  Tile tile;
  for (auto& row : tile.k)
    for (uint8_t& code : row) code = random() & 15;
  for (auto& row : tile.v)
    for (uint8_t& code : row) code = random() & 3;
  for (float* vector : {tile.k_scale, tile.k_token, tile.v_channel, tile.v_scale})
    for (int i = 0; i < 128; ++i) vector[i] = (512 + random() % 1024) / 1024.f;
  return tile;
}

inline void put_half(uint8_t* at, int index, float value) {
  const __half h = __float2half_rn(value);
  std::memcpy(at + 2 * index, &h, 2);
}

// in_order: bytes of a word as columns 0 1 2 3, a variation; the format has 0 2 1 3.
inline void pack_ours(const Tile& tile, bool in_order, uint8_t* record) {
  using namespace kvarn::format;
  static constexpr int kSwap[4] = {0, 2, 1, 3};
  std::memset(record, 0, kRecordBytes);
  for (int row = 0; row < 128; ++row)
    for (int column = 0; column < 128; ++column) {
      const int place = in_order ? column / 4 * 4 + kSwap[column % 4] : column;
      const CodePlace k = code_place(make_plane(128, 128, 4, 0), row, place),
                      v = code_place(make_plane(128, 128, 2, 0), row, place);
      record[k.byte] |= tile.k[row][column] << k.bit;
      record[kVCodes + v.byte] |= tile.v[row][column] << v.bit;
    }
  for (int i = 0; i < 128; ++i) {
    put_half(record + kKScale, i, tile.k_scale[i]);
    put_half(record + kKToken, i, tile.k_token[i]);
    put_half(record + kVChannel, i, tile.v_channel[i]);
    put_half(record + kVScale, i, tile.v_scale[i]);
  }
}

// Design A keeps s_k scaled by 4 and 1/4 and s_v permuted and scaled by 8, 2, 1/2 and 1/8, by the digit. natural: it
// does not.
inline void pack_design_a(const Tile& tile, bool natural, uint8_t* record) {
  std::memset(record, 0, kRecordBytes);
  for (int t = 0; t < kTokens; ++t) {
    const int r = t / 16, m = t % 16 / 2, h = t & 1;
    for (int d = 0; d < kChannels; ++d) {
      const int s = d % 32 / 4;
      record[1024 * m + 512 * (s / 4) + 16 * (4 * r + d / 32) + 4 * (s % 4) + 2 * (d & 1) + h] |= tile.k[t][d]
                                                                                                  << 4 * (d >> 1 & 1);
      record[kVCodes + 512 * (d % 16 / 2) + 16 * (4 * (d / 16) + r / 2) + 4 * (m / 2) + 2 * (r & 1) + (d & 1)] |=
          tile.v[d][t] << (4 * (m & 1) + 2 * h);
    }
    put_half(record + kKToken, t, tile.k_token[t]);
    if (natural)
      put_half(record + kVScale, t, tile.v_scale[t]);
    else
      put_half(record + kVScale, 32 * (r / 2) + 4 * m + 2 * h + (r & 1),
               tile.v_scale[t] * 8 / (1 << 2 * (2 * (m & 1) + h)));
  }
  for (int d = 0; d < kChannels; ++d) {
    put_half(record + kKScale, d, tile.k_scale[d] * (natural ? 1 : d & 2 ? .25f : 4.f));
    put_half(record + kVChannel, d, tile.v_channel[d]);
  }
}

using Matrix = std::vector<double>;  // [rows][8]
struct Answer {
  Matrix scores, outputs;
};

// q, p [8][128]. The chain's p is made of its scores; kChainUnit keeps it in the range of fp16.
inline constexpr double kChainUnit = 1. / 64;

inline Answer answer(const Tile& tile, const Matrix& q, const Matrix& p, bool chain) {
  Answer a{Matrix(kTokens * kColumns), Matrix(kChannels * kColumns)};
  for (int t = 0; t < kTokens; ++t)
    for (int c = 0; c < kColumns; ++c) {
      double sum = 0;
      for (int d = 0; d < kChannels; ++d) sum += tile.k[t][d] * q[128 * c + d] * (chain ? tile.k_scale[d] : 1);
      a.scores[kColumns * t + c] = chain ? sum * tile.k_token[t] * kChainUnit : sum;
    }
  for (int d = 0; d < kChannels; ++d)
    for (int c = 0; c < kColumns; ++c) {
      double sum = 0;
      for (int t = 0; t < kTokens; ++t)
        sum += tile.v[d][t] * (chain ? a.scores[kColumns * t + c] * tile.v_scale[t] : p[128 * c + t]);
      a.outputs[kColumns * d + c] = chain ? sum * tile.v_channel[d] : sum;
    }
  return a;
}

// Design A with int8 operands as given per field: what its fields' sums amount to per column.
inline Matrix effective(const Matrix& x, int fields, int stride, int bits) {
  Matrix e(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const int f = int(i) / stride % fields;
    for (int j = f; j < fields; ++j) e[i] += x[i + size_t(j - f) * stride] * (1 << bits * f);
  }
  return e;
}

// Most words of one bank that a quarter warp's part of a 16-byte load touches; 1 is free of conflicts.
template <class Layout>
int bank_ways() {
  size_t worst = 0;
  Layout::each_load([&](auto offset) {
    for (int first = 0; first < 32; first += 8) {
      std::set<int> words[32];
      for (int lane = first; lane < first + 8; ++lane)
        for (int i = 0; i < 4; ++i) words[(offset(lane) / 4 + i) % 32].insert(offset(lane) / 4 + i);
      for (const auto& bank : words) worst = std::max(worst, bank.size());
    }
  });
  return int(worst);
}
