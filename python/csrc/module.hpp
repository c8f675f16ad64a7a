// SPDX-License-Identifier: Apache-2.0
// What the parts of kvarn._core share.
#pragma once

#include <nanobind/nanobind.h>

#include "kvarn/kvarn.h"

namespace kvarn::python {

// Throws the Python exception of a status, with the last error's details; nothing for KVARN_OK.
void check(kvarn_status status);

// The verbs on device memory: cuda.cpp.
void add_cuda(nanobind::module_& m);

}  // namespace kvarn::python
