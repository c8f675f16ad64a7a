// SPDX-License-Identifier: Apache-2.0
// The AVX-512 target: the verbs over its vectors.
#define KVARN_CPU avx512
#include "cpu/simd_avx512.hpp"
// clang-format off
#include "cpu/target.inl"
// clang-format on

namespace kvarn {
const Kernels* avx512_kernels() { return &avx512::kKernels; }
}  // namespace kvarn
