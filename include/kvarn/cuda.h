/* kvarn on NVIDIA GPUs (compute capability 8.0 and up), C ABI.
 *
 * The verbs of kvarn.h on device memory and a stream: the same bytes in the pages, the same names. Nothing here
 * allocates, waits for the device or reads device memory from the host, so every call can be captured into a CUDA
 * graph; a replay with other lengths, tables and rows in the same memory is right.
 *
 * A step:   kvarn_cuda_plan once, then for every layer kvarn_cuda_append and kvarn_cuda_attend, all on one stream; last
 *           kvarn_cuda_pack, if the step defers.
 *           Attention with another plan than the append's, for a part of the requests, must not follow that append
 *           directly: it starts reading packed tiles that the step does not complete by its own plan. Any other kernel
 *           of kvarn's between them, such as kvarn_cuda_rotate, makes it wait.
 *
 * What the host cannot see is not checked: a request whose length, query range or table row is inconsistent is left out
 * by the plan, and page indices outside the pool are clamped into it, so that a corrupt table gives wrong numbers for
 * its own request but no fault.
 */
#ifndef KVARN_CUDA_H_
#define KVARN_CUDA_H_

#include "kvarn/kvarn.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st* kvarn_cuda_stream; /* cudaStream_t; NULL: the default stream */

/* The most that any step of a workspace will ask for. */
typedef struct kvarn_cuda_limits {
  int32_t tokens;      /* rows of k, v and q in one step */
  int32_t requests;    /* of one step */
  int32_t query_heads; /* 0: append and expand only */
  int32_t max_seq_len;
  int32_t ctas; /* attention's grid; 0: one per multiprocessor. No result depends on it */
} kvarn_cuda_limits;

/* Device memory of the caller, 256-byte aligned, zeroed once before its first use. One serves all layers, one stream.
 */
typedef struct kvarn_cuda_workspace {
  void* data;
  int64_t bytes;
  kvarn_cuda_limits limits;
} kvarn_cuda_workspace;

/* One step. The pointers in `batch` are device pointers. */
typedef struct kvarn_cuda_step {
  kvarn_batch batch;
  const int64_t*
      slots;      /* NULL, or [tokens] in device memory: a request whose first row's slot is negative takes no part */
  int32_t tokens; /* rows of k, v, q: at least query_starts[requests] */
  int32_t max_query_len; /* no request has more rows in this step */
  int32_t defer; /* 0, or 1: append leaves to kvarn_cuda_pack the tiles that no row of this step reads packed: the last
                    one of a request whose last row completes it, unless another request of the step has its page. No
                    result depends on it; a tile's 20 to 40 us are then spent once a step, not once a layer */
} kvarn_cuda_step;

/* What kvarn_cuda_pack needs of a layer: device pointers, as kvarn_cuda_append has them. */
typedef struct kvarn_cuda_layer {
  kvarn_pages pages;
  const float* feedback;
} kvarn_cuda_layer;

typedef struct kvarn_cuda_attention {
  float scale;        /* of the scores, finite */
  float soft_cap;     /* 0 (off) or > 0: score = soft_cap * tanh(score / soft_cap) */
  int32_t window;     /* 0 (off), or how many tokens a row sees, its own included. The plan's window must be the same */
  const float* sinks; /* NULL, or [query_heads] in device memory: a logit per head that takes probability, no value */
  const float* balance; /* what kvarn_cuda_append of these pages had */
} kvarn_cuda_attention;

/* 1 if this build has CUDA kernels and a usable device is present; otherwise 0, and kvarn_last_error() says why. */
int32_t kvarn_cuda_available(void);
/* What this build was made for, "80 90", and the shapes that have kernels, "k4v2_g128_d128", .., ended by NULL; empty
 * without CUDA. */
const char* kvarn_cuda_architectures(void);
const char* const* kvarn_cuda_shapes(void);

kvarn_status kvarn_cuda_workspace_bytes(const kvarn_layout* layout, const kvarn_cuda_limits* limits, int64_t* bytes);

/* Works out, on the device, what the step's append, attend and prefill will do. One plan serves every layer that has
 * this layout, these query heads and this window. */
kvarn_status kvarn_cuda_plan(const kvarn_layout* layout, const kvarn_cuda_step* step, int32_t query_heads,
                             int32_t window, const kvarn_cuda_workspace* workspace, kvarn_cuda_stream stream);

/* Rotates the step's k and v, writes them raw, and packs every tile that completed.
 * k, v      [step.tokens][kv_heads][head_dim] in device memory, any dtype each
 * feedback  NULL, or float [kv_heads][head_dim][head_dim] in device memory, 16-byte aligned (see kvarn_append)
 * balance   NULL, or float [kv_heads][head_dim] in device memory, 16-byte aligned, powers of two (see kvarn_append)
 * replaced  NULL, or a counter in device memory to which the number of replaced elements is added (see kvarn_append) */
kvarn_status kvarn_cuda_append(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_cuda_step* step,
                               const kvarn_rows* k, const kvarn_rows* v, kvarn_encoder encoder, const float* feedback,
                               const float* balance, int64_t* replaced, const kvarn_cuda_workspace* workspace,
                               kvarn_cuda_stream stream);

/* Packs what the appends of a step that defers left, of `count` layers (at most 512) at once: after the last
 * one's attend and before the next plan in this workspace, with the step's block table as it was. Every layer whose
 * append had the plan must be among them, once, with that append's pages and feedback; `layers` is read by the host. */
kvarn_status kvarn_cuda_pack(const kvarn_layout* layout, const kvarn_cuda_layer* layers, int32_t count,
                             const kvarn_cuda_step* step, kvarn_encoder encoder, const kvarn_cuda_workspace* workspace,
                             kvarn_cuda_stream stream);

/* out[t][h] = softmax over the request's tokens 0 .. position(t), times v; see kvarn_attend. Rows of requests that take
 * no part become zeros. q, out [step.tokens][query_heads][head_dim], float16, bfloat16 or float32. */
kvarn_status kvarn_cuda_attend(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_cuda_step* step,
                               const kvarn_rows* q, const kvarn_rows_out* out, const kvarn_cuda_attention* attention,
                               const kvarn_cuda_workspace* workspace, kvarn_cuda_stream stream);

/* The complete tiles of each request, dequantized in the rotated basis, one request after the other, as kvarn_expand.
 * k, v      [sum over r of G * floor(seq_lens[r] / G) or more][kv_heads][head_dim], 16-bit or float32
 * Tiles that the outputs have no room for are left out. Needs no plan; query_starts is ignored. */
kvarn_status kvarn_cuda_expand(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                               const kvarn_rows_out* k, const kvarn_rows_out* v, const kvarn_cuda_workspace* workspace,
                               kvarn_cuda_stream stream);

/* The orthonormal Hadamard rotation of the last axis, its own inverse. in and out may be the same memory. */
kvarn_status kvarn_cuda_rotate(int32_t head_dim, const kvarn_rows* in, const kvarn_rows_out* out,
                               kvarn_cuda_stream stream);

/* Prefill on a 16-bit attention kernel (docs/kernels.md): every query tile, the rows of one request in one tile,
 * becomes a sequence of its own, whose keys are the expanded tiles before it and last its own tile raw. */
typedef struct kvarn_cuda_prefill {
  int32_t first_request; /* requests first_request .. end_request-1 take part */
  int32_t end_request;
  int32_t table_width;   /* entries per row of block_table */
  int32_t sequences;     /* rows of block_table: at least tokens / G + 2 * requests */
  int32_t* block_table;  /* out, [sequences][table_width]: pages of k and v below */
  int32_t* seq_lens;     /* out, [sequences]; 0 beyond the last */
  int32_t* query_starts; /* out, [sequences + 1], rows of q counted from 0 of the step; the last value repeats: where
                            end_request's rows begin */
  int32_t pages;         /* pages of k and v; tiles beyond are left out and `overflow` is set */
  int32_t* overflow;     /* out, [1]: pages that were missing, 0 if all went well */
} kvarn_cuda_prefill;

/* Writes the tables of `prefill` and fills its pages: k, v [pages * G][kv_heads][head_dim], float16 or bfloat16, in the
 * rotated basis. After kvarn_cuda_append of the same step and layer. */
kvarn_status kvarn_cuda_prefill_pages(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_cuda_step* step,
                                      const kvarn_cuda_prefill* prefill, const kvarn_rows_out* k,
                                      const kvarn_rows_out* v, const kvarn_cuda_workspace* workspace,
                                      kvarn_cuda_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* KVARN_CUDA_H_ */
