// SPDX-License-Identifier: Apache-2.0
// kvarn/cuda.h with kernels: check, find the device, map the workspace, launch.
#include "kvarn/cuda.h"

#include "api/check.hpp"
#include "api/cuda_check.hpp"
#include "api/cuda_device.hpp"
#include "api/error.hpp"
#include "cuda/dispatch.hpp"
#include "cuda/launch.hpp"

using namespace kvarn;

namespace {

constexpr kvarn_pages kNoPages{};

kvarn_status check_built(const kvarn_layout& layout) {
  if (cuda::is_built(layout)) return KVARN_OK;
  return fail(
      KVARN_BAD_LAYOUT,
      "this build has no CUDA kernels for k%dv%d_g%d_d%d: it was configured with KVARN_CUDA_SHAPES, which names "
      "others (kvarn doctor lists them)",
      layout.k_bits, layout.v_bits, layout.page_tokens, layout.head_dim);
}

int32_t ctas_of(const kvarn_cuda_limits& limits, const cuda::Gpu& gpu) {
  return limits.ctas > 0 ? limits.ctas : gpu.multiprocessors;
}

// Arguments are checked; what is left is whether the shape, the device and the workspace are there.
template <class Run>
kvarn_status launch(const char* verb, const kvarn_layout& layout, const kvarn_pages& pages, const kvarn_cuda_step& step,
                    const kvarn_cuda_workspace& workspace, kvarn_cuda_stream stream, const Run& run) {
  KVARN_TRY(check_built(layout));
  cuda::Gpu gpu{};
  KVARN_TRY(cuda::find_gpu(&gpu));
  const int32_t ctas = ctas_of(workspace.limits, gpu);
  const cuda::WorkspaceMap map = cuda::WorkspaceMap::make(layout, workspace.limits, ctas);
  if (workspace.bytes < map.bytes)
    return fail(KVARN_WORKSPACE_TOO_SMALL, "the workspace has %lld bytes; its limits need %lld",
                static_cast<long long>(workspace.bytes), static_cast<long long>(map.bytes));
  const cuda::Launch all{layout, pages, step,  workspace.limits, static_cast<uint8_t*>(workspace.data),
                         map,    ctas,  stream};
  return cuda::status_of(run(all), verb);
}

}  // namespace

extern "C" int32_t kvarn_cuda_available(void) {
  cuda::Gpu gpu{};
  return cuda::find_gpu(&gpu) == KVARN_OK;
}

extern "C" const char* kvarn_cuda_architectures(void) { return KVARN_CUDA_ARCHITECTURES; }
extern "C" const char* const* kvarn_cuda_shapes(void) { return cuda::built_shapes(); }

extern "C" kvarn_status kvarn_cuda_workspace_bytes(const kvarn_layout* layout, const kvarn_cuda_limits* limits,
                                                   int64_t* bytes) {
  KVARN_TRY(cuda::check_workspace_bytes(layout, limits, bytes));
  cuda::Gpu gpu{};
  if (limits->ctas == 0) KVARN_TRY(cuda::find_gpu(&gpu));
  *bytes = cuda::WorkspaceMap::make(*layout, *limits, ctas_of(*limits, gpu)).bytes;
  return KVARN_OK;
}

extern "C" kvarn_status kvarn_cuda_plan(const kvarn_layout* layout, const kvarn_cuda_step* step, int32_t query_heads,
                                        int32_t window, const kvarn_cuda_workspace* workspace,
                                        kvarn_cuda_stream stream) {
  KVARN_TRY(cuda::check_plan(layout, step, query_heads, window, workspace));
  return launch("plan", *layout, kNoPages, *step, *workspace, stream,
                [&](const cuda::Launch& all) { return cuda::plan(all, query_heads, window); });
}

extern "C" kvarn_status kvarn_cuda_append(const kvarn_layout* layout, const kvarn_pages* pages,
                                          const kvarn_cuda_step* step, const kvarn_rows* k, const kvarn_rows* v,
                                          kvarn_encoder encoder, const float* feedback, const float* balance,
                                          int64_t* replaced, const kvarn_cuda_workspace* workspace,
                                          kvarn_cuda_stream stream) {
  KVARN_TRY(cuda::check_append(layout, pages, step, k, v, encoder, feedback, balance, replaced, workspace));
  if (step->tokens == 0 || step->batch.requests == 0) return KVARN_OK;
  return launch("append", *layout, *pages, *step, *workspace, stream, [&](const cuda::Launch& all) {
    return cuda::append(all, *k, *v, encoder, feedback, balance, replaced);
  });
}

extern "C" kvarn_status kvarn_cuda_pack(const kvarn_layout* layout, const kvarn_cuda_layer* layers, int32_t count,
                                        const kvarn_cuda_step* step, kvarn_encoder encoder,
                                        const kvarn_cuda_workspace* workspace, kvarn_cuda_stream stream) {
  KVARN_TRY(cuda::check_pack(layout, layers, count, step, encoder, workspace));
  if (step->tokens == 0 || step->batch.requests == 0 || count == 0) return KVARN_OK;
  return launch("pack", *layout, kNoPages, *step, *workspace, stream,
                [&](const cuda::Launch& all) { return cuda::pack(all, layers, count, encoder); });
}

extern "C" kvarn_status kvarn_cuda_attend(const kvarn_layout* layout, const kvarn_pages* pages,
                                          const kvarn_cuda_step* step, const kvarn_rows* q, const kvarn_rows_out* out,
                                          const kvarn_cuda_attention* attention, const kvarn_cuda_workspace* workspace,
                                          kvarn_cuda_stream stream) {
  KVARN_TRY(cuda::check_attend(layout, pages, step, q, out, attention, workspace));
  if (step->tokens == 0) return KVARN_OK;
  return launch("attend", *layout, *pages, *step, *workspace, stream,
                [&](const cuda::Launch& all) { return cuda::attend(all, *q, *out, *attention); });
}

extern "C" kvarn_status kvarn_cuda_expand(const kvarn_layout* layout, const kvarn_pages* pages,
                                          const kvarn_batch* batch, const kvarn_rows_out* k, const kvarn_rows_out* v,
                                          const kvarn_cuda_workspace*, kvarn_cuda_stream stream) {
  KVARN_TRY(cuda::check_expand(layout, pages, batch, k, v));
  if (batch->requests == 0 || k->tokens == 0) return KVARN_OK;
  KVARN_TRY(check_built(*layout));
  cuda::Gpu gpu{};
  KVARN_TRY(cuda::find_gpu(&gpu));
  return cuda::status_of(cuda::expand(*layout, *pages, *batch, *k, *v, stream), "expand");
}

extern "C" kvarn_status kvarn_cuda_rotate(int32_t head_dim, const kvarn_rows* in, const kvarn_rows_out* out,
                                          kvarn_cuda_stream stream) {
  KVARN_TRY(cuda::check_rotate(head_dim, in, out));
  if (in->tokens == 0 || in->heads == 0) return KVARN_OK;
  cuda::Gpu gpu{};
  KVARN_TRY(cuda::find_gpu(&gpu));
  return cuda::status_of(cuda::rotate(head_dim, *in, *out, stream), "rotate");
}

extern "C" kvarn_status kvarn_cuda_prefill_pages(const kvarn_layout* layout, const kvarn_pages* pages,
                                                 const kvarn_cuda_step* step, const kvarn_cuda_prefill* prefill,
                                                 const kvarn_rows_out* k, const kvarn_rows_out* v,
                                                 const kvarn_cuda_workspace* workspace, kvarn_cuda_stream stream) {
  KVARN_TRY(cuda::check_prefill_pages(layout, pages, step, prefill, k, v, workspace));
  return launch("prefill_pages", *layout, *pages, *step, *workspace, stream,
                [&](const cuda::Launch& all) { return cuda::prefill_pages(all, *prefill, *k, *v); });
}
