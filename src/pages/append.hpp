// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "pages/workspace.hpp"

namespace kvarn {

// Arguments are checked. Returns how many elements of k and v were replaced.
int64_t append(const Step& step, const Workspace& workspace, const Kernels& kernels, const kvarn_executor* executor,
               const kvarn_rows& k, const kvarn_rows& v, kvarn_encoder encoder, const float* feedback,
               const float* balance);

}  // namespace kvarn
