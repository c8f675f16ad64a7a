// SPDX-License-Identifier: Apache-2.0
// Which target runs: chosen once per call, forced by argument or by KVARN_TARGET.
#include "target/dispatch.hpp"

#include <cstdlib>
#include <cstring>

#include "api/error.hpp"

namespace kvarn {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

struct Target {
  const char* name;
  const Kernels* kernels;  // null: not available here
};

const Target* targets() {  // best first
  static const Target list[] = {{"avx512", has_avx512() ? avx512_kernels() : nullptr},
                                {"avx2", has_avx2() ? avx2_kernels() : nullptr},
                                {"scalar", scalar_kernels()},
                                {nullptr, nullptr}};
  return list;
}

}  // namespace

kvarn_status find_target(const char* name, const Kernels** found) {
  *found = nullptr;
  if (name == nullptr) {
    name = std::getenv("KVARN_TARGET");
    if (name != nullptr && *name == '\0') name = nullptr;
  }
  for (const Target* target = targets(); target->name != nullptr; ++target) {
    if (name == nullptr && target->kernels == nullptr) continue;
    if (name != nullptr && std::strcmp(name, target->name) != 0) continue;
    if (target->kernels == nullptr)
      return fail(KVARN_TARGET_UNAVAILABLE,
                  "target \"%s\": this CPU or build lacks it; leave KVARN_TARGET unset to take the best", name);
    *found = target->kernels;
    return KVARN_OK;
  }
  return fail(KVARN_UNKNOWN_TARGET, "target \"%.40s\" is unknown; allowed: avx512, avx2, scalar", name);
}

}  // namespace kvarn

extern "C" const char* const* kvarn_targets(void) {
  struct Names {
    const char* list[4] = {};
    Names() {
      int count = 0;
      for (const kvarn::Target* target = kvarn::targets(); target->name != nullptr; ++target)
        if (target->kernels != nullptr) list[count++] = target->name;
    }
  };
  static const Names names;
  return names.list;
}

extern "C" const char* kvarn_target(const char* name) {
  const kvarn::Kernels* found;
  return kvarn::find_target(name, &found) == KVARN_OK ? found->name : nullptr;
}
