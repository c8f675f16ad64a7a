// SPDX-License-Identifier: Apache-2.0
// What the parts of kvarn._core share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "kvarn/kvarn.h"

namespace kvarn::python {

// Throws the Python exception of a status, with the last error's details; nothing for KVARN_OK.
void check(kvarn_status status);

// Throws ValueError for an unknown name.
kvarn_encoder encoder_of(const std::string& name);

// The verbs on device memory: cuda.cpp.
void add_cuda(nanobind::module_& m);

}  // namespace kvarn::python
