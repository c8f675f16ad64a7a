// SPDX-License-Identifier: Apache-2.0
// The kernels' host side: arguments are checked (api.cpp), shapes have kernels. Each returns the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/plan.hpp"

namespace kvarn::cuda {

// What every verb of a step gets.
struct Launch {
  const kvarn_layout& layout;
  const kvarn_pages& pages;
  const kvarn_cuda_step& step;
  const kvarn_cuda_limits& limits;
  uint8_t* workspace;
  WorkspaceMap map;
  int32_t ctas;  // of attention
  cudaStream_t stream;

  Plan plan() const;
};

cudaError_t plan(const Launch& launch, int32_t query_heads, int32_t window);
cudaError_t append(const Launch& launch, const kvarn_rows& k, const kvarn_rows& v, kvarn_encoder encoder,
                   const float* feedback, const float* balance, int64_t* replaced);
cudaError_t pack(const Launch& launch, const kvarn_cuda_layer* layers, int32_t count, kvarn_encoder encoder);
cudaError_t attend(const Launch& launch, const kvarn_rows& q, const kvarn_rows_out& out,
                   const kvarn_cuda_attention& attention);
cudaError_t expand(const kvarn_layout& layout, const kvarn_pages& pages, const kvarn_batch& batch,
                   const kvarn_rows_out& k, const kvarn_rows_out& v, cudaStream_t stream);
cudaError_t rotate(int32_t head_dim, const kvarn_rows& in, const kvarn_rows_out& out, cudaStream_t stream);
cudaError_t prefill_pages(const Launch& launch, const kvarn_cuda_prefill& prefill, const kvarn_rows_out& k,
                          const kvarn_rows_out& v);

}  // namespace kvarn::cuda
