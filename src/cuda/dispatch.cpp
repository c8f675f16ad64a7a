// SPDX-License-Identifier: Apache-2.0
#include "cuda/dispatch.hpp"

namespace kvarn::cuda {

bool is_built(const kvarn_layout& layout) {
  bool found = false;
#define SHAPE(k, v, g, d) found = found || has_shape<Shape<k, v, g, d>>(layout);
#include "built_shapes.inc"
#undef SHAPE
  return found;
}

const char* const* built_shapes() {
  static constexpr const char* names[] = {
#define SHAPE(k, v, g, d) "k" #k "v" #v "_g" #g "_d" #d,
#include "built_shapes.inc"
#undef SHAPE
      nullptr};
  return names;
}

}  // namespace kvarn::cuda
