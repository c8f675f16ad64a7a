// SPDX-License-Identifier: Apache-2.0
#include "api/error.hpp"

#include <cstdarg>
#include <cstdio>

namespace kvarn {
namespace {
thread_local char last_error[512] = "";
}

kvarn_status fail(kvarn_status status, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace kvarn

extern "C" const char* kvarn_last_error(void) { return kvarn::last_error; }

extern "C" const char* kvarn_status_message(kvarn_status status) {
  switch (status) {
    case KVARN_OK:
      return "ok";
    case KVARN_NULL_POINTER:
      return "a pointer that must not be null is null";
    case KVARN_MISALIGNED:
      return "memory is not aligned as required";
    case KVARN_UNKNOWN_PRESET:
      return "no such preset";
    case KVARN_UNSUPPORTED_HEAD_DIM:
      return "head_dim is not supported";
    case KVARN_BAD_LAYOUT:
      return "the layout was not made by kvarn_layout_init of this version";
    case KVARN_BAD_SHAPE:
      return "shapes do not fit together";
    case KVARN_BAD_DTYPE:
      return "dtype is not float32, float16 or bfloat16";
    case KVARN_BAD_STRIDE:
      return "strides are not supported";
    case KVARN_BAD_ARGUMENT:
      return "an argument is out of range";
    case KVARN_BAD_LENGTH:
      return "sequence lengths and query starts do not fit together";
    case KVARN_BAD_PAGE_INDEX:
      return "a block table names a page outside the pool";
    case KVARN_WORKSPACE_TOO_SMALL:
      return "the workspace is too small";
    case KVARN_WORKSPACE_STALE:
      return "the workspace does not hold this step's raw tiles";
    case KVARN_UNKNOWN_TARGET:
      return "no such target";
    case KVARN_TARGET_UNAVAILABLE:
      return "this CPU or build lacks the target";
    case KVARN_CUDA_ERROR:
      return "the CUDA runtime reported an error";
    case KVARN_CUDA_UNAVAILABLE:
      return "no CUDA kernels, or no device that they run on";
    case KVARN_STATUS_INT32:
      break;
  }
  return "unknown status";
}
