// SPDX-License-Identifier: Apache-2.0
// Errors are values. The details of the last one are kept per thread, in a fixed buffer.
#pragma once

#include "kvarn/kvarn.h"

namespace kvarn {

// Records what was given, what is allowed and what to do; returns `status`.
[[gnu::format(printf, 2, 3)]] kvarn_status fail(kvarn_status status, const char* format, ...);

}  // namespace kvarn
