// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "pages/step.hpp"

namespace kvarn {

// Arguments are checked; scratch holds one element per thread.
void expand(const Step& step, Scratch* scratch, const Kernels& kernels, const kvarn_executor* executor,
            const kvarn_rows_out& k, const kvarn_rows_out& v);

}  // namespace kvarn
