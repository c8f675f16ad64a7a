// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory, and copies from global memory that complete on them. From sm_90 on the copy engine carries long
// stretches; before, the lanes of a warp do, 16 bytes at a time.
#pragma once

#include "cuda/machine.cuh"

namespace kvarn::cuda {

using Barrier = uint64_t;

// Where something lies in shared memory.
struct Shared {
  uint32_t address;
  __device__ Shared(const void* pointer) : address(shared_address(pointer)) {}
  __device__ explicit Shared(uint32_t at) : address(at) {}
  __device__ Shared operator+(uint32_t bytes) const { return Shared(address + bytes); }
};

__device__ inline void init_barrier(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the last init, before the barriers are used by others or by the copy engine.
__device__ inline void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Between what threads wrote or read and copies of the copy engine that touch the same. Two fences: the one of all
// spaces would also wait until the whole GPU sees what was written (MEMBAR.ALL.GPU, 0.2 us).
__device__ inline void order_before_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// By every lane that calls: each releases what it wrote itself, and what it saw before a __syncwarp.
__device__ inline void arrive(Shared barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier.address) : "memory");
}

// Has the phase of that parity ended? What was released to it is visible then. Does not wait.
__device__ inline bool ended(Shared barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier.address), "r"(parity)
               : "memory");
  return done != 0;
}
__device__ inline void wait(Shared barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier.address), "r"(parity)
                 : "memory");
  } while (done == 0);
#else
  while (!ended(barrier, parity)) {
  }
#endif
}

// Are stretches carried by all lanes of a warp? Each then waits itself for what was read there before.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kLanesCopy = true;
#else
inline constexpr bool kLanesCopy = false;
#endif
inline constexpr uint32_t kCopyArrivals = 32;  // of a warp's lanes, or of one that announces for all

// Announces `bytes` that the copies of one lane will bring, by that lane, before them; for so many arrivals.
__device__ inline void expect_bytes(Shared barrier, uint32_t bytes, uint32_t arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier.address), "r"(bytes)
               : "memory");
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0], %1; }" ::"r"(barrier.address),
               "r"(arrivals)
               : "memory");
#endif
}

// 16 bytes, carried by the lane; to wait for all of its own, or to have each lane arrive at a barrier when its own are there.
__device__ inline void copy_chunk(Shared to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.address), "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ inline void wait_for_chunks() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ inline void finish_chunks(Shared barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier.address) : "memory");
}

// How the caches treat what is read once: it leaves the second level first, which keeps what is read again (code, plan,
// partial results).
struct ReadOnce {
  uint64_t policy = 0;
  __device__ ReadOnce() {
#if __CUDA_ARCH__ >= 900
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  }
};

// A stretch of `bytes`, a multiple of 16, by one lane; before sm_90 by all lanes of a warp, followed by finish_chunks().
__device__ inline void copy_stretch(Shared to, const void* from, uint32_t bytes, Shared barrier, int lane,
                                    ReadOnce once) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          to.address),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier.address), "l"(once.policy)
      : "memory");
#else
  for (uint32_t i = 16 * lane; i < bytes; i += 512)
    copy_chunk(to + i, static_cast<const uint8_t*>(from) + i);
#endif
}

}  // namespace kvarn::cuda
