// SPDX-License-Identifier: Apache-2.0
// kvarn/cuda.h in a build without CUDA: arguments are checked as ever, then the answer is that there are no kernels.
#include "api/check.hpp"
#include "api/cuda_check.hpp"
#include "api/error.hpp"

using namespace kvarn;

namespace {

kvarn_status absent() {
  return fail(KVARN_CUDA_UNAVAILABLE,
              "this build of kvarn has no CUDA kernels (cmake found no nvcc, or KVARN_CUDA was OFF); install the CUDA "
              "toolkit and build again with -DKVARN_CUDA=ON");
}

}  // namespace

extern "C" int32_t kvarn_cuda_available(void) {
  absent();
  return 0;
}

extern "C" const char* kvarn_cuda_architectures(void) { return ""; }

extern "C" const char* const* kvarn_cuda_shapes(void) {
  static const char* const none[] = {nullptr};
  return none;
}

extern "C" kvarn_status kvarn_cuda_workspace_bytes(const kvarn_layout* layout, const kvarn_cuda_limits* limits,
                                                   int64_t* bytes) {
  KVARN_TRY(cuda::check_workspace_bytes(layout, limits, bytes));
  return absent();
}

extern "C" kvarn_status kvarn_cuda_plan(const kvarn_layout* layout, const kvarn_cuda_step* step, int32_t query_heads,
                                        int32_t window, const kvarn_cuda_workspace* workspace, kvarn_cuda_stream) {
  KVARN_TRY(cuda::check_plan(layout, step, query_heads, window, workspace));
  return absent();
}

extern "C" kvarn_status kvarn_cuda_pack(const kvarn_layout* layout, const kvarn_cuda_layer* layers, int32_t count,
                                        const kvarn_cuda_step* step, kvarn_encoder encoder,
                                        const kvarn_cuda_workspace* workspace, kvarn_cuda_stream) {
  KVARN_TRY(cuda::check_pack(layout, layers, count, step, encoder, workspace));
  return absent();
}

extern "C" kvarn_status kvarn_cuda_append(const kvarn_layout* layout, const kvarn_pages* pages,
                                          const kvarn_cuda_step* step, const kvarn_rows* k, const kvarn_rows* v,
                                          kvarn_encoder encoder, const float* feedback, const float* balance,
                                          int64_t* replaced, const kvarn_cuda_workspace* workspace, kvarn_cuda_stream) {
  KVARN_TRY(cuda::check_append(layout, pages, step, k, v, encoder, feedback, balance, replaced, workspace));
  return absent();
}

extern "C" kvarn_status kvarn_cuda_attend(const kvarn_layout* layout, const kvarn_pages* pages,
                                          const kvarn_cuda_step* step, const kvarn_rows* q, const kvarn_rows_out* out,
                                          const kvarn_cuda_attention* attention, const kvarn_cuda_workspace* workspace,
                                          kvarn_cuda_stream) {
  KVARN_TRY(cuda::check_attend(layout, pages, step, q, out, attention, workspace));
  return absent();
}

extern "C" kvarn_status kvarn_cuda_expand(const kvarn_layout* layout, const kvarn_pages* pages,
                                          const kvarn_batch* batch, const kvarn_rows_out* k, const kvarn_rows_out* v,
                                          const kvarn_cuda_workspace*, kvarn_cuda_stream) {
  KVARN_TRY(cuda::check_expand(layout, pages, batch, k, v));
  return absent();
}

extern "C" kvarn_status kvarn_cuda_rotate(int32_t head_dim, const kvarn_rows* in, const kvarn_rows_out* out,
                                          kvarn_cuda_stream) {
  KVARN_TRY(cuda::check_rotate(head_dim, in, out));
  return absent();
}

extern "C" kvarn_status kvarn_cuda_prefill_pages(const kvarn_layout* layout, const kvarn_pages* pages,
                                                 const kvarn_cuda_step* step, const kvarn_cuda_prefill* prefill,
                                                 const kvarn_rows_out* k, const kvarn_rows_out* v,
                                                 const kvarn_cuda_workspace* workspace, kvarn_cuda_stream) {
  KVARN_TRY(cuda::check_prefill_pages(layout, pages, step, prefill, k, v, workspace));
  return absent();
}
