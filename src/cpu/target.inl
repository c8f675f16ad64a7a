// SPDX-License-Identifier: Apache-2.0
// One target: the verbs, compiled for the vectors that the including file chose. Everything here has internal linkage
// or is always inlined; a shared inline function would let the linker hand this file's instructions to another CPU
// (tests/lint/check_symbols.sh looks for that).
#include <cstdint>

#include "format/fragment.hpp"
#include "target/kernels.hpp"

// clang-format off: each builds on the ones before it
#include "cpu/vector.inl"
#include "cpu/rotate.inl"
#include "cpu/codes.inl"
#include "cpu/weighted.inl"
#include "cpu/feedback.inl"
#include "cpu/varnorm.inl"
#include "cpu/encode.inl"
#include "cpu/product.inl"
#include "cpu/softmax.inl"
#include "cpu/attend_packed.inl"
#include "cpu/attend_raw.inl"
// clang-format on

namespace kvarn::KVARN_CPU {

#define KVARN_STRING_OF(name) #name
#define KVARN_STRING(name) KVARN_STRING_OF(name)

static constexpr Kernels kKernels{KVARN_STRING(KVARN_CPU), rotate_raw, rotate, load_query, store_row, encode, expand,
                                  attend_packed,           attend_raw, fold,   finish};

}  // namespace kvarn::KVARN_CPU
