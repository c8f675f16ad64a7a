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
  for (int e = 0; e < kHeadDim / 8; e += 2) {  // bit 0 of the channel
    const float p = x[e], q = x[e + 1];
    x[e] = p + q;
    x[e + 1] = p - q;
  }
#pragma unroll 1
  for (int mask = 4; mask < 32; mask *= 2)  // bits 1, 2, 3 are g
#pragma unroll
    for (float& y : x) {
      const float other = __shfl_xor_sync(~0u, y, mask);
      y = lane & mask ? other - y : y + other;
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

__device__ inline uint32_t pack_bfloats(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// A segment's result, all of it in `total`, to the rows of the warp's columns. Not inlined: two roles end with it, and code
// that is read from far away takes longer than a call.
template <class S>
__device__ __noinline__ void finish(const AttendParameters& p, const BlockPlan& b, int head, int warp,
                       const StoredState<S::head_dim>& total, int lane) {
  const int g = lane >> 2, i = lane & 3, local = kWarpColumns * warp + i;
  if (kWarpColumns * warp >= b.columns) return;
  const int column = b.first_column + min(local, b.columns - 1);
  const int row = b.row + column / p.group, query_head = head * p.group + column % p.group;
  float x[S::head_dim / 8], a = 1, l = total.l[i];
#pragma unroll
  for (int q = 0; q < S::head_dim / 32; ++q) {
    const float4 y = total.out[q][lane];
    x[4 * q] = y.x, x[4 * q + 1] = y.y, x[4 * q + 2] = y.z, x[4 * q + 3] = y.w;
  }
  if (p.sinks != nullptr) {  // one more logit in the sum
    const float sink = p.sinks[query_head] * 1.44269504f, unit = fmaxf(ceilf(sink), kEmpty);
    const FoldFactors f = fold_factors(total.m[i], unit);
    a = f.a;
    l = fold_value(l, exp2_fast(sink - unit), f);
  }
  const float inverse = a / l;
#pragma unroll
  for (float& y : x) y *= inverse;
  rotate_column<S::head_dim>(x, lane);
  if (local >= b.columns) return;
  const int64_t start = row * p.out.token_stride + query_head * p.out.head_stride + 2 * g;
#pragma unroll
  for (int t = 0; t < S::head_dim / 16; ++t) {
    const float low = x[2 * t], high = x[2 * t + 1];
    const int64_t to = start + 16 * t;
    if (p.out.dtype == KVARN_FLOAT32) {
      float* out = static_cast<float*>(p.out.data) + to;
      out[0] = low, out[1] = high;
    } else {
      const uint32_t bits = p.out.dtype == KVARN_FLOAT16 ? pack_halves(low, high) : pack_bfloats(low, high);
      uint16_t* out = static_cast<uint16_t*>(p.out.data) + to;
      out[0] = static_cast<uint16_t>(bits), out[1] = static_cast<uint16_t>(bits >> 16);
    }
  }
}

// The folding warp: every run of the CTA's share, in order. Levels: piece, then group, chapter and segment, which are
// levels 0, 1 and 2 of the parts that a CTA leaves. It must take a run in less time than a team needs for a step.
template <class S>
class Folder {
 public:
  __device__ Folder(const AttendParameters& p, const Cut& cut, Room<S>& room, int lane)
      : p_(p), cut_(cut), room_(room), parts_(p, static_cast<int>(blockIdx.x)), lane_(lane) {}

  __device__ void run() {
    if (cut_.units == 0) return;
    const Schedule schedule(p_, cut_);
    int query_slot = 0;
    Place at;
    at.begin(p_, cut_);
#pragma unroll 1
    for (int l = 0; l < Room<S>::kLevels; ++l) clear(l);
#pragma unroll 1
    for (bool more = true; more;) {
      // One segment, or this CTA's part of it.
      const BlockPlan& b = p_.plan.blocks[at.block];
      const Closing closing = Closing::of<S>(b, p_.group);
      const int first_unit = at.unit, end_unit = min(at.units, first_unit + cut_.units - at.number);
      const bool begun_before = first_unit > 0;
      // The highest level whose state began where the order has one begin.
      int open = begun_before ? closing.after(first_unit - 1) - 1 : 2;
#pragma unroll 1
      for (int unit = first_unit; unit < end_unit; ++unit) {
        if (schedule.splits(at.number + unit - first_unit))
          take_steps(Unit::of<S>(b, p_.group, unit).steps);
        else
          take(1);
        const int close = closing.after(unit);
#pragma unroll 1
        for (int level = 0; level <= close; ++level) {
          if (open < level) {
            flush(level, close, begun_before);
            break;
          }
          if (level < close) close_level(level + 1);
        }
        open = max(open, close - 1);
      }
      if (!begun_before && end_unit == at.units) {
#pragma unroll 1
        for (int w = 0; w < p_.team_warps; ++w) finish<S>(p_, b, at.head, w, level(3, w), lane_);
        __syncwarp();
        clear(3);
      } else {
#pragma unroll 1
        for (int level = 2; level >= 0; --level)
          if (filled_ >> (level + 1) & 1) flush(level, level, begun_before);
        share<S>(p_, at, counts_, first_unit, end_unit - first_unit, room_.merges, lane_);
      }
      arrive(&room_.queries_empty[query_slot]);
      if (++query_slot == p_.teams) query_slot = 0;
      more = at.advance(p_, end_unit - first_unit, cut_.units);
    }
  }

 private:
  __device__ StoredState<S::head_dim>& level(int level, int warp) const {
    return room_.level(p_, buffers_ >> 4 * level & 15, warp);
  }
  __device__ void clear(int level) {
#pragma unroll 1
    for (int w = 0; w < p_.team_warps; ++w) this->level(level, w).clear(lane_);
    filled_ &= ~(1u << level);
    __syncwarp();
  }
  // Folds `level` into the one above it. If that is empty they change places, which gives the same.
  __device__ void close_level(int level) {
    if (filled_ >> (level + 1) & 1) {
#pragma unroll 1
      for (int w = 0; w < p_.team_warps; ++w) fold(this->level(level + 1, w), this->level(level, w), lane_);
      clear(level);
    } else {
      const unsigned differ = (buffers_ >> 4 * level ^ buffers_ >> 4 * (level + 1)) & 15;
      buffers_ ^= differ << 4 * level | differ << 4 * (level + 1);
      filled_ = (filled_ & ~(1u << level)) | 2u << level;
    }
  }
  // The next run into a level.
  __device__ void take(int level) {
    wait(&room_.results_full[slot_], parity_);
#pragma unroll 1
    for (int w = 0; w < p_.team_warps; ++w) fold(this->level(level, w), room_.result(p_, slot_, w), lane_);
    filled_ |= 1u << level;
    release();
  }
  // A unit whose steps are runs.
  __device__ void take_steps(int steps) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) take(0);
#pragma unroll 1
    for (int step = steps; step < kPieceTiles; ++step) {  // there is nothing in these
      wait(&room_.results_full[slot_], parity_);
      release();
    }
    close_level(0);
  }
  __device__ void release() {
    arrive(&room_.results_empty[slot_]);
    if (++slot_ == p_.results) slot_ = 0, parity_ ^= 1;
  }
  // Leaves a level for whoever merges the segment.
  __device__ void flush(int level, int close, bool begun_before) {
    const int index = counts_.head + counts_.tail;
#pragma unroll 1
    for (int w = 0; w < p_.team_warps; ++w) parts_.part(index)[w].copy(this->level(level + 1, w), lane_);
    if (lane_ == 0) parts_.code(index) = level | close << 2;
    ++(begun_before ? counts_.head : counts_.tail);
    __syncwarp();
    clear(level + 1);
  }

  const AttendParameters& p_;
  const Cut& cut_;
  Room<S>& room_;
  Parts<S> parts_;
  PartCounts counts_{0, 0};
  int lane_, slot_ = 0;
  uint32_t parity_ = 0;
  unsigned filled_ = 0;  // bit l: level l holds something
  unsigned buffers_ = 0x3210;  // digit l: where level l is
};

}  // namespace kvarn::cuda
