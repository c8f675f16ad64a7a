// SPDX-License-Identifier: Apache-2.0
// The AVX2 target: the verbs over its vectors.
#define KVARN_CPU avx2
#include "cpu/simd_avx2.hpp"
// clang-format off
#include "cpu/target.inl"
// clang-format on

namespace kvarn {
const Kernels* avx2_kernels() { return &avx2::kKernels; }
}  // namespace kvarn
