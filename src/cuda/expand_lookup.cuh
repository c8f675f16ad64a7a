// SPDX-License-Identifier: Apache-2.0
// Which request an item belongs to, when request r has count(r) of them. The host knows no lengths, so each CTA sums
// them up once, in runs of adjacent requests, one run a thread; a look-up searches the runs, then walks one.
#pragma once

#include <cstdint>

namespace kvarn::cuda {

struct Place {
  int32_t request;
  int64_t index;  // of the item among its request's
};

template <int Threads>
struct Lookup {
  int64_t before[Threads + 1];  // items before each run; the last: all
  int64_t warps[Threads / 32];
  int32_t first, end, run;

  template <class Count>
  __device__ void build(int32_t first_request, int32_t end_request, Count count) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int32_t length = max(1, (end_request - first_request + Threads - 1) / Threads);
    const int64_t from = first_request + int64_t{thread} * length;
    int64_t sum = 0;
    for (int64_t r = from; r < min(from + length, int64_t{end_request}); ++r) sum += count(static_cast<int32_t>(r));
    for (int o = 1; o < 32; o *= 2) {
      const int64_t other = __shfl_up_sync(~0u, sum, o);
      if (lane >= o) sum += other;
    }
    if (lane == 31) warps[thread / 32] = sum;
    __syncthreads();
    for (int w = 0; w < thread / 32; ++w) sum += warps[w];
    before[thread + 1] = sum;
    if (thread == 0) before[0] = 0, first = first_request, end = end_request, run = length;
    __syncthreads();
  }

  __device__ int64_t total() const { return before[Threads]; }

  // item < total(). `hint` is the run that the look-up before found, 0 at first; items must not go back.
  template <class Count>
  __device__ Place find(int64_t item, int& hint, Count count) const {
    if (item >= before[hint + 1]) {
      ++hint;
      for (int high = Threads; high - hint > 1;) {
        const int middle = (hint + high) / 2;
        (before[middle] <= item ? hint : high) = middle;
      }
    }
    int64_t at = before[hint];
    int32_t r = first + hint * run;
    if (run > 1)
      for (int64_t n; r < end - 1 && item >= at + (n = count(r)); ++r) at += n;
    return {r, item - at};
  }

  // Items of the requests before `request`.
  template <class Count>
  __device__ int64_t before_request(int32_t request, Count count) const {
    const int32_t skip = (request - first) / run;
    int64_t at = before[skip];
    for (int32_t r = first + skip * run; r < request; ++r) at += count(r);
    return at;
  }
};

}  // namespace kvarn::cuda
