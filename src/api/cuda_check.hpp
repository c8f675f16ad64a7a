// SPDX-License-Identifier: Apache-2.0
// What the host can check of the arguments of kvarn/cuda.h; each takes what the verb of its name takes. Device memory
// is not read. The workspace's size is not checked here: it depends on the device.
#pragma once

#include "kvarn/cuda.h"

namespace kvarn::cuda {

kvarn_status check_workspace_bytes(const kvarn_layout* layout, const kvarn_cuda_limits* limits, const int64_t* bytes);
kvarn_status check_plan(const kvarn_layout* layout, const kvarn_cuda_step* step, int32_t query_heads, int32_t window,
                        const kvarn_cuda_workspace* workspace);
kvarn_status check_pack(const kvarn_layout* layout, const kvarn_cuda_layer* layers, int32_t count,
                        const kvarn_cuda_step* step, kvarn_encoder encoder, const kvarn_cuda_workspace* workspace);
kvarn_status check_append(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_cuda_step* step,
                          const kvarn_rows* k, const kvarn_rows* v, kvarn_encoder encoder, const float* feedback,
                          const float* balance, const int64_t* replaced, const kvarn_cuda_workspace* workspace);
kvarn_status check_attend(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_cuda_step* step,
                          const kvarn_rows* q, const kvarn_rows_out* out, const kvarn_cuda_attention* attention,
                          const kvarn_cuda_workspace* workspace);
kvarn_status check_expand(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                          const kvarn_rows_out* k, const kvarn_rows_out* v);
kvarn_status check_rotate(int32_t head_dim, const kvarn_rows* in, const kvarn_rows_out* out);
kvarn_status check_prefill_pages(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_cuda_step* step,
                                 const kvarn_cuda_prefill* prefill, const kvarn_rows_out* k, const kvarn_rows_out* v,
                                 const kvarn_cuda_workspace* workspace);

}  // namespace kvarn::cuda
