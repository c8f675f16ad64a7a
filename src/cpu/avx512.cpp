// SPDX-License-Identifier: Apache-2.0
// The AVX-512 target: the verbs over its vectors.
#include "target/kernels.hpp"

#ifdef __x86_64__
#define KVARN_CPU avx512
// clang-format off: the vectors first
#include "cpu/simd_avx512.hpp"
#include "cpu/target.inl"
// clang-format on

const kvarn::Kernels* kvarn::avx512_kernels() { return &avx512::kKernels; }
#else
const kvarn::Kernels* kvarn::avx512_kernels() { return nullptr; }
#endif
