// SPDX-License-Identifier: Apache-2.0
// Folding: one warp of a CTA takes the pieces in order, pieces into groups of 8, those into chapters of 8, those into the
// segment (block, KV head), and writes what is complete. What a CTA has of a segment that it shares with others goes to
// global memory, as large as the order allows (attend_merge.cuh).
#pragma once

#include "cuda/attend_merge.cuh"
#include "cuda/device.cuh"

namespace kvarn::cuda {

// The inverse rotation of the lane's column: channel 16 T + 2 g + h lies in element 2 T + h.
template <int kHeadDim>
__device__ inline void rotate_column(float (&x)[kHeadDim / 8], int lane) {
#pragma unroll
  for (int bit = 1; bit < 16; bit *= 2)
#pragma unroll
    for (int e = 0; e < kHeadDim / 8; ++e) {
      if (bit == 1) {
        if (e % 2 == 0) {
          const float a = x[e], b = x[e + 1];
          x[e] = a + b;
          x[e + 1] = a - b;
        }
      } else {
        const float other = __shfl_xor_sync(~0u, x[e], 2 * bit);  // bits 1, 2, 3 of the channel are g: lanes 4, 8, 16
        x[e] = lane & 2 * bit ? other - x[e] : x[e] + other;
      }
    }
  constexpr int kFirst = kHeadDim == 96 ? 64 : kHeadDim;  // 96 = 64 + 32 are rotated apart
#pragma unroll
  for (int start = 0; start < kHeadDim; start += kFirst) {
    const int block = start == 0 ? kFirst : kHeadDim - kFirst;
#pragma unroll
    for (int bit = 1; bit < block / 16; bit *= 2)
#pragma unroll
      for (int t = 0; t < block / 16; ++t)
        if ((t & bit) == 0)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int e = 2 * (start / 16 + t) + h;
            const float a = x[e], b = x[e + 2 * bit];
            x[e] = a + b;
            x[e + 2 * bit] = a - b;
          }
    const float scale = block == 256 ? 0.0625f : block == 128 ? 0.0883883461f : block == 64 ? 0.125f : 0.176776692f;
#pragma unroll
    for (int e = 0; e < block / 8; ++e) x[start / 8 + e] *= scale;
    if (kFirst == kHeadDim) break;
  }
}

template <class S, int kTiles>
struct Folder {
  using Stored = StoredState<S::head_dim, kTiles>;
  const AttendParameters& p;
  Stored* levels;  // group, chapter, segment
  int lane;

  __device__ void clear() const {
    for (int l = 0; l < 3; ++l) levels[l].clear(lane);
    __syncwarp();
  }
  __device__ void close(int from, int to) const {
    for (int l = from; l < to; ++l) {
      fold(levels[l + 1], levels[l], lane);
      levels[l].clear(lane);
      __syncwarp();
    }
  }

  // levels[2] holds all of the segment.
  __device__ void finish(const BlockPlan& b, int head) const {
    const int g = lane >> 2, i = lane & 3;
    for (int nt = 0; nt < kTiles; ++nt) {
      const int local = 4 * nt + i, column = b.first_column + local;
      const int row = b.row + column / p.group, query_head = head * p.group + column % p.group;
      float x[S::head_dim / 8], a = 1, l = levels[2].l[local];
#pragma unroll
      for (int q = 0; q < S::head_dim / 32; ++q) {
        const float4 y = levels[2].out[nt][q][lane];
        x[4 * q] = y.x, x[4 * q + 1] = y.y, x[4 * q + 2] = y.z, x[4 * q + 3] = y.w;
      }
      if (p.sinks != nullptr && local < b.columns) {  // one more logit in the sum
        const float sink = p.sinks[query_head] * 1.44269504f, m = levels[2].m[local];
        const FoldFactors f = fold_factors(m, fmaxf(ceilf(sink), kEmpty));
        a = f.a;
        l = fold_value(l, exp2_fast(sink - fmaxf(ceilf(sink), kEmpty)), f);
      }
      const float inverse = a / l;
#pragma unroll
      for (float& y : x) y *= inverse;
      rotate_column<S::head_dim>(x, lane);
      if (local < b.columns) {
        const int64_t start = row * p.out.token_stride + query_head * p.out.head_stride + 2 * g;
#pragma unroll
        for (int t = 0; t < S::head_dim / 16; ++t) {
          store_element(x[2 * t], p.out.data, p.out.dtype, start + 16 * t);
          store_element(x[2 * t + 1], p.out.data, p.out.dtype, start + 16 * t + 1);
        }
      }
    }
  }
};

// How far the order closes after a unit: 0 nothing, 1 its group, 2 its chapter too.
template <class S>
__device__ inline int closes(const AttendParameters& p, const BlockPlan& b, int unit) {
  const int packed = packed_units(b);
  if (unit < packed) {
    const int after = b.first_tile / kPieceTiles + unit + 1;
    if (unit + 1 == packed || after % (kFoldPieces * kFoldPieces) == 0) return 2;
    return after % kFoldPieces == 0 ? 1 : 0;
  }
  return unit + 1 == packed + pieces_of(own_tokens<S>(b, p.group, 0)) || unit + 1 == b.units ? 2 : 0;
}

// The folding warp: every piece of the CTA's share, in order.
template <class S, int kTiles>
__device__ void fold_share(const AttendParameters& p, const Cut& cut, StoredState<S::head_dim, kTiles>* levels,
                           StoredState<S::head_dim, kTiles>* results, Barrier* full, Barrier* empty,
                           Barrier* queries_empty, MergeList& merges, int lane) {
  const Folder<S, kTiles> folder{p, levels, lane};
  const Parts<S, kTiles> parts(p, static_cast<int>(blockIdx.x));
  PartCounts counts{0, 0};
  int slot = 0, query_slot = 0;
  uint32_t parity = 0;
  Place at;
  at.begin(p, cut);
  for (bool more = cut.units > 0; more;) {
    // One segment, or this CTA's part of it.
    const int first_unit = at.unit, end_unit = min(at.units, first_unit + cut.units - at.number);
    const bool whole = first_unit == 0 && end_unit == at.units;
    int32_t& written = first_unit > 0 ? counts.head : counts.tail;
    unsigned dirty = 0;  // bit l: level l holds something
    const auto flush = [&](int level, int close) {
      const int index = counts.head + counts.tail;
      parts.part(index).copy(levels[level], lane);
      if (lane == 0) parts.record().code[index] = static_cast<uint8_t>(level | close << 2);
      ++written;
      levels[level].clear(lane);
      dirty &= ~(1u << level);
      __syncwarp();
    };
    // The highest level whose state began where the order has one begin.
    int open = first_unit == 0 ? 2 : closes<S>(p, p.plan.blocks[at.block], first_unit - 1) - 1;
    folder.clear();
    for (int unit = first_unit; unit < end_unit; ++unit) {
      wait(&full[slot], parity);
      fold(levels[0], results[slot], lane);
      arrive(&empty[slot]);
      if (++slot == p.folds) slot = 0, parity ^= 1;
      dirty |= 1;
      const int close = closes<S>(p, p.plan.blocks[at.block], unit);
      for (int level = 0; level <= close; ++level) {
        if (open < level) {
          flush(level, close);
          break;
        }
        if (level == close) break;
        folder.close(level, level + 1);
        dirty = (dirty & ~(1u << level)) | 2u << level;
      }
      open = max(open, close - 1);
    }
    if (whole) {
      folder.finish(p.plan.blocks[at.block], at.head);
    } else {
      for (int level = 2; level >= 0; --level)
        if (dirty >> level & 1) flush(level, level);
      share<S, kTiles>(p, at, counts, first_unit, end_unit - first_unit, merges, lane);
    }
    __syncwarp();
    arrive(&queries_empty[query_slot]);
    if (++query_slot == p.query_slots) query_slot = 0;
    more = at.advance(p, end_unit - first_unit, cut.units);
  }
}

}  // namespace kvarn::cuda
