// SPDX-License-Identifier: Apache-2.0
// From a layout to the shape whose kernels it uses. cmake writes built_shapes.inc: a line SHAPE(k_bits, v_bits,
// page_tokens, head_dim) for every shape of this build, and for each one instance of every file in instances/.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/shape.hpp"

namespace kvarn::cuda {

template <class S>
constexpr bool has_shape(const kvarn_layout& layout) {
  return layout.k_bits == S::k_bits && layout.v_bits == S::v_bits && layout.page_tokens == S::page_tokens &&
         layout.head_dim == S::head_dim;
}

// body(Shape<...>{}) for the layout's shape; is_built(layout) holds.
template <class Body>
cudaError_t dispatch(const kvarn_layout& layout, const Body& body) {
#define SHAPE(k, v, g, d) \
  if (has_shape<Shape<k, v, g, d>>(layout)) return body(Shape<k, v, g, d>{});
#include "built_shapes.inc"
#undef SHAPE
  return cudaErrorInvalidDeviceFunction;
}

// Does this build have the layout's shape? Where has_kernels() says yes, a build of some shapes may still say no.
bool is_built(const kvarn_layout& layout);
// The shapes of this build, "k4v2_g128_d128" and so on, ended by null.
const char* const* built_shapes();

}  // namespace kvarn::cuda
