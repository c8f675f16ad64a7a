// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory, and copies from global memory that complete on them. A copy is issued by a whole warp. From
// sm_90 on the copy engine carries it; before, the lanes do, 16 bytes at a time.
#pragma once

#include "cuda/machine.cuh"

namespace kvarn::cuda {

using Barrier = uint64_t;

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

// By every lane that calls: each releases what it wrote itself, and what it saw before a __syncwarp.
__device__ inline void arrive(Barrier* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void wait(Barrier* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#endif
  } while (done == 0);
}

#if __CUDA_ARCH__ >= 900
inline constexpr uint32_t kCopyArrivals = 1;
#else
inline constexpr uint32_t kCopyArrivals = 32;
#endif

// Announces `bytes` that copies will bring: by one lane, or by all lanes, of which one announces, before the copies.
__device__ inline void expect_bytes(Barrier* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
__device__ inline void expect_copies(Barrier* barrier, uint32_t bytes, bool announces) {
  if (announces) expect_bytes(barrier, bytes);
  __syncwarp();
}

// In place of copies, where a barrier waits for some but there is nothing to bring; by all lanes.
__device__ inline void expect_nothing(Barrier* barrier, bool announces) {
  if (announces || kCopyArrivals > 1) arrive(barrier);
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

// One lane's copy of `bytes`, a multiple of 16. Before sm_90 that lane carries all of it.
__device__ inline void copy_row(void* to, const void* from, uint32_t bytes, Barrier* barrier, ReadOnce once) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)), "l"(once.policy)
      : "memory");
#else
  for (uint32_t i = 0; i < bytes; i += 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + i),
                 "l"(__cvta_generic_to_global(static_cast<const uint8_t*>(from) + i))
                 : "memory");
#endif
}

// The warp's copy of one stretch.
__device__ inline void copy_stretch(void* to, const void* from, uint32_t bytes, Barrier* barrier, int lane,
                                    ReadOnce once) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0) copy_row(to, from, bytes, barrier, once);
#else
  for (uint32_t i = 16 * lane; i < bytes; i += 512)
    copy_row(static_cast<uint8_t*>(to) + i, static_cast<const uint8_t*>(from) + i, 16, barrier, once);
#endif
}

// After the last copy that belongs to what expect_copies announced.
__device__ inline void finish_copies(Barrier* barrier) {
#if __CUDA_ARCH__ < 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

}  // namespace kvarn::cuda
