// SPDX-License-Identifier: Apache-2.0
// The end of a CTA: what its lists were left with, folded by all warps. A segment that it has to itself is finished; of
// one that it shares with other CTAs its parts go to global memory, and the last CTA to arrive folds the parts of all.
#pragma once

#include "cuda/attend_finish.cuh"
#include "cuda/attend_slices.cuh"

namespace kvarn::cuda {

// How many parts a CTA left of the segment it did not begin, and of the one it only began.
struct alignas(8) PartCounts {
  int32_t head, tail;
};

// A CTA's stretch of the workspace: PartCounts and ranks in the first place, then the parts, a state of each quad of a
// team: those of the head from the first one on, those of the tail from the last one back.
template <class S>
struct Parts {
  using Stored = StoredState<S::head_dim>;
  static constexpr int64_t kBytes = part_bytes(S::head_dim);
  static_assert(kMaxTeamQuads * sizeof(Stored) <= kBytes && sizeof(PartCounts) + 4 * kMaxStates <= kBytes);

  uint8_t* base;
  int most;
  __device__ Parts(const AttendParameters& p, int cta)
      : base(p.plan.parts + cta * (p.max_parts + int64_t{1}) * kBytes), most(p.max_parts) {}
  __device__ PartCounts& counts() const { return *reinterpret_cast<PartCounts*>(base); }
  __device__ int32_t& ranks(int index) const { return reinterpret_cast<int32_t*>(base + sizeof(PartCounts))[index]; }
  __device__ Stored* part(int index) const { return reinterpret_cast<Stored*>(base + (index + 1) * kBytes); }
  __device__ int place(int index, bool tail) const { return tail ? most - 1 - index : index; }
};

template <class S>
class Merge {
 public:
  using Stored = StoredState<S::head_dim>;

  __device__ Merge(const AttendParameters& p, RoomOf<S> room, int warp, int lane)
      : p_(p), room_(room), end_(*reinterpret_cast<Ending*>(room.base + p.in.ending_at)), warp_(warp), lane_(lane) {}

  __device__ void run() {
    const int count = room_->left_count;
    if (count == 0) return;
    for_slices(count, [&](int i, int rank, int slice) { fold_lists(room_->left[i], rank, slice); });
    __syncthreads();
    if (warp_ < count && lane_ == 0 && room_->left[warp_].steps > 0) arrive_at(room_->left[warp_]);
#pragma unroll 1
    for (int i = warp_; i < count * p_.in.team_quads(); i += kWarps) {
      const Left& left = room_->left[i / p_.in.team_quads()];
      if (left.steps > 0) continue;
      const int rank = i % p_.in.team_quads();
      finish_at(left, rank, *reinterpret_cast<const Stored*>(first_piece(left)->at + rank * sizeof(Stored)));
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      if (room_->left[i].merges) merge(room_->left[i]);
  }

 private:
  static constexpr int kSlices = S::head_dim / 32;

  template <class Body>
  __device__ void for_slices(int segments, Body body) {
    const int team_quads = p_.in.team_quads(), tasks = segments * team_quads * kSlices;
#pragma unroll 1
    for (int task = warp_; task < tasks; task += kWarps)
      body(task / kSlices / team_quads, task / kSlices % team_quads, task % kSlices);
  }
  __device__ void finish_at(const Left& left, int rank, const Stored& total) const {
    finish<S>(p_, left.target, left.head, rank, total, lane_);
  }
  // The first of a list's pieces of a segment, and the one behind its last.
  __device__ const Piece* begin_of(const Left& left, int list) const {
    const int warp = list * p_.in.team_warps;
    return room_->pieces[warp] + (left.begins && list == left.first ? room_->counts[warp].last_segment : 0);
  }
  __device__ const Piece* end_of(const Left& left, int list) const {
    const int warp = list * p_.in.team_warps;
    return room_->pieces[warp] +
           (left.ends && list == left.last ? room_->counts[warp].first_segment : room_->counts[warp].count);
  }
  __device__ const Piece* first_piece(const Left& left) const {
    int list = left.first;
    while (begin_of(left, list) == end_of(left, list)) ++list;
    return begin_of(left, list);
  }

  // What the lists were left with of a segment; to where it is finished (its first state) or waits for other CTAs'
  // parts.
  __device__ void fold_lists(const Left& left, int rank, int slice) {
    SliceFold fold(end_.waiting[warp_], lane_);
    const int offset = rank * static_cast<int>(sizeof(Stored)) + slice * static_cast<int>(sizeof(Slice));
    const bool tells = slice == 0 && rank == 0 && lane_ == 0;
    Slice* whole = reinterpret_cast<Slice*>(first_piece(left)->at + offset);
#pragma unroll 1
    for (int list = left.first; list <= left.last; ++list) {
      const Piece* end = end_of(left, list);
#pragma unroll 1
      for (const Piece* next = begin_of(left, list); next != end; ++next) {
        const Piece piece = *next;
        Slice* at = reinterpret_cast<Slice*>(piece.at + offset);
        State<1> state;
        load_state(state, at, lane_);
        fold.take(state, at, piece.rank, piece.next);
      }
    }
    const Parts<S> parts(p_, static_cast<int>(blockIdx.x));
    __syncwarp();
    const int count = fold.leave([&](int i, const State<1>& state, int before, int next) {
      const int place = parts.place(i, left.end == 1);
      store_state(state, left.steps == 0 ? whole : parts.part(place)[rank].slices + slice, lane_);
      if (tells && left.steps > 0) parts.ranks(place) = before << 8 | (next & 255);
    });
    if (tells && left.steps > 0) (left.end == 0 ? parts.counts().head : parts.counts().tail) = count;
  }

  // Makes this CTA's parts of a segment known, by one thread.
  __device__ void arrive_at(Left& left) {
    uint32_t* counter = &p_.plan.counters[left.first_cta];
    const auto steps = static_cast<uint32_t>(left.steps);
    left.merges = add_and_fence(counter, steps) + steps == static_cast<uint32_t>(left.all_steps);
    if (left.merges) *counter = 0;
  }

  // By the whole CTA, where states and slots were: a warp has a slice, and room for that of the parts. The results lie
  // where queries were.
  __device__ void merge(const Left& left) {
    for_slices(1, [&](int, int rank, int slice) { merge_slice(left, rank, slice); });
    __syncthreads();
    if (warp_ < p_.in.team_quads()) finish_at(left, warp_, merged(warp_));
    __syncthreads();
  }
  __device__ Stored& merged(int rank) const { return reinterpret_cast<Stored*>(room_.queries(0))[rank]; }

  __device__ void merge_slice(const Left& left, int rank, int slice) {
    const int bytes = (p_.in.ending_at - p_.in.states_at) / kWarps, most = bytes / static_cast<int>(sizeof(Slice) + 16);
    Slice* copies = reinterpret_cast<Slice*>(room_.base + p_.in.states_at) + warp_ * most;
    int32_t* codes =
        reinterpret_cast<int32_t*>(reinterpret_cast<Slice*>(room_.base + p_.in.states_at) + kWarps * most) +
        warp_ * most;
    SliceFold fold(end_.waiting[warp_], lane_);
    int before = 0;  // parts of the CTAs before
#pragma unroll 1
    for (int base = left.first_cta; base <= left.last_cta; base += 32) {
      // A lane has a CTA. Loads that do not need each other are in flight together.
      const int cta = min(base + lane_, left.last_cta);
      const bool tail = cta == left.first_cta;
      const Parts<S> parts(p_, cta);
      const int first_code = __ldcg(&parts.ranks(parts.place(0, tail)));
      const int written = __ldcg(tail ? &parts.counts().tail : &parts.counts().head);
      const bool inside = base + lane_ <= left.last_cta && share_of(p_, cta * p_.in.teams, p_.in.teams).steps() > 0;
      const int count = inside ? written : 0;
      int until = count;  // inclusive scan
#pragma unroll 1
      for (int o = 1; o < 32; o *= 2) {
        const int other = __shfl_up_sync(~0u, until, o);
        if (lane_ >= o) until += other;
      }
      const int all = __shfl_sync(~0u, until, 31);
      const auto part = [&](int i) { return parts.part(parts.place(i, tail))[rank].slices + slice; };
      const auto code = [&](int i) { return i == 0 ? first_code : __ldcg(&parts.ranks(parts.place(i, tail))); };
      const int fit = max(0, min(all, most - before));
      const int first = until - count, mine = max(0, min(count, fit - first));
      begin_slices(mine);
#pragma unroll 1
      for (int i = 0; i < mine; ++i) {
        copy_slice(copies + before + first + i, part(i));
        codes[before + first + i] = code(i);
      }
      wait_for_slices();
#pragma unroll 1
      for (int i = before; i < before + fit; ++i) {
        State<1> state;
        load_state(state, copies + i, lane_);
        fold.take(state, copies + i, codes[i] >> 8, static_cast<int8_t>(codes[i] & 255));
      }
      // What there is no room for is folded where it is.
#pragma unroll 1
      for (int i = fit; i < all; ++i) {
        const int owner = __ffs(static_cast<int>(__ballot_sync(~0u, until > i))) - 1, index = i - first;
        const uint64_t address = lane_ == owner ? reinterpret_cast<uint64_t>(part(index)) : 0;
        const int its = lane_ == owner ? code(index) : 0;
        Slice* from = reinterpret_cast<Slice*>(__shfl_sync(~0u, address, owner));
        const int ranks = __shfl_sync(~0u, its, owner);
        State<1> state;
        load_state(state, from, lane_);
        fold.take(state, from, ranks >> 8, static_cast<int8_t>(ranks & 255));
      }
      before += fit;
    }
    fold.leave([&](int, const State<1>& state, int, int) { store_state(state, merged(rank).slices + slice, lane_); });
  }
  // A lane's copies of whole slices, and the warp's wait for those of all lanes.
  __device__ void begin_slices(int count) {
#if __CUDA_ARCH__ >= 900
    order_before_copies();
    expect_bytes(&room_->parts_full[warp_], static_cast<uint32_t>(count * sizeof(Slice)), 1);
#endif
  }
  __device__ void copy_slice(Slice* to, const Slice* from) {
#if __CUDA_ARCH__ >= 900
    copy_stretch(to, from, sizeof(Slice), &room_->parts_full[warp_], lane_, once_);
#else
    for (uint32_t i = 0; i < sizeof(Slice); i += 16)
      copy_chunk(reinterpret_cast<uint8_t*>(to) + i, reinterpret_cast<const uint8_t*>(from) + i);
#endif
  }
  __device__ void wait_for_slices() {
#if __CUDA_ARCH__ >= 900
    wait(&room_->parts_full[warp_], parity_);
    parity_ ^= 1;
#else
    wait_for_chunks();
#endif
    __syncwarp();
  }

  const AttendParameters& p_;
  const RoomOf<S> room_;
  Ending& end_;
  const int warp_, lane_;
  uint32_t parity_ = 0;
  ReadOnce once_;
};

}  // namespace kvarn::cuda
