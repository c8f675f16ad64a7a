// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "target/kernels.hpp"

namespace kvarn {

// The target with this name; null name: environment KVARN_TARGET, else the best of this CPU. On an error *found stays
// null and the status says why.
kvarn_status find_target(const char* name, const Kernels** found);

}  // namespace kvarn
