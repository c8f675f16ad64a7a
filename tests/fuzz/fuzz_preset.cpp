// SPDX-License-Identifier: Apache-2.0
// The preset parser and the layout table take any text and any numbers.
#include <cstring>
#include <string>

#include "kvarn/kvarn.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  int32_t numbers[2] = {128, 8};
  if (size >= 9 && data[0] & 1) std::memcpy(numbers, data + 1, 8);
  const std::string name(reinterpret_cast<const char*>(data), size);
  kvarn::Layout layout{};
  if (kvarn::Layout::make(name, numbers[0], numbers[1], layout) &&
      layout.page_bytes != layout.record_bytes * numbers[1])
    __builtin_trap();
  (void)kvarn_target(name.c_str());
  return 0;
}
