// SPDX-License-Identifier: Apache-2.0
// What keeps vectors in registers, and SIMD code inside its own file.
#pragma once

#define KVARN_INLINE [[gnu::always_inline]] inline
// Accumulators indexed by a loop live in registers only if the loop is gone; -O2 alone keeps it.
#ifdef __clang__
#define KVARN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVARN_UNROLL _Pragma("GCC unroll 16")
#endif
