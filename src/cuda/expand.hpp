// SPDX-License-Identifier: Apache-2.0
// expand and the prefill pages, per shape: declared here for the dispatch, defined in expand_kernel.cuh and
// expand_prefill.cuh, which the instantiation files include.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/plan.hpp"

namespace kvarn::cuda {

// Rows that a kernel writes: strides in bytes.
struct Output {
  uint8_t* data;
  int64_t token_stride, head_stride;
  kvarn_dtype dtype;

  static Output of(const kvarn_rows_out& rows) {
    const int64_t element = rows.dtype == KVARN_FLOAT32 ? 4 : 2;
    return {static_cast<uint8_t*>(rows.data), rows.token_stride * element, rows.head_stride * element, rows.dtype};
  }
  // May 16 bytes be written at every eighth channel?
  bool vectors() const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && token_stride % 16 == 0 && head_stride % 16 == 0;
  }
  bool half_vectors() const { return dtype != KVARN_FLOAT32 && vectors(); }
};

struct ExpandArguments {
  kvarn_pages pages;
  kvarn_batch batch;
  Output k, v;
  int64_t tiles;  // that the outputs have room for
  int32_t heads;
};

struct PrefillArguments {
  kvarn_pages pages;
  kvarn_batch batch;
  kvarn_cuda_prefill prefill;
  Plan plan;
  Output k, v;
  int32_t heads, tokens;  // of the step
};

template <class Shape>
cudaError_t expand_shape(const ExpandArguments& arguments, cudaStream_t stream);
template <class Shape>
cudaError_t prefill_shape(const PrefillArguments& arguments, cudaStream_t stream);

}  // namespace kvarn::cuda
