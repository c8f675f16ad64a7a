// SPDX-License-Identifier: Apache-2.0
// The AVX2 target: the verbs over its vectors.
#include "target/kernels.hpp"

#ifdef __x86_64__
#define KVARN_CPU avx2
// clang-format off: the vectors first
#include "cpu/simd_avx2.hpp"
#include "cpu/target.inl"
// clang-format on

const kvarn::Kernels* kvarn::avx2_kernels() { return &avx2::kKernels; }
#else
const kvarn::Kernels* kvarn::avx2_kernels() { return nullptr; }
#endif
