/* kvarn: the low-bit KV cache, C ABI.
 *
 * Four verbs over pages that the caller owns: append, attend, expand, rotate. The library allocates nothing on the hot
 * path, starts no thread, prints nothing and ends no process. Every function checks its arguments before it writes a
 * byte: on an error nothing was changed, the status says what kind, kvarn_last_error() says what was given, what is
 * allowed and what to do. The bytes of a page are defined in docs/specification.md.
 *
 * A step of a layer:  kvarn_append (all requests), then kvarn_attend with the same pages, batch and workspace.
 */
#ifndef KVARN_KVARN_H_
#define KVARN_KVARN_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVARN_FORMAT_VERSION 1
#define KVARN_VERSION_STRING "0.1.0"

/* Pinned values, spaced by kind; never renumbered. */
typedef enum kvarn_status {
  KVARN_OK = 0,
  KVARN_NULL_POINTER = 10,
  KVARN_MISALIGNED = 11,
  KVARN_UNKNOWN_PRESET = 20,
  KVARN_UNSUPPORTED_HEAD_DIM = 21,
  KVARN_BAD_LAYOUT = 22,
  KVARN_BAD_SHAPE = 30,
  KVARN_BAD_DTYPE = 31,
  KVARN_BAD_STRIDE = 32,
  KVARN_BAD_ARGUMENT = 33,
  KVARN_BAD_LENGTH = 40,
  KVARN_BAD_PAGE_INDEX = 41,
  KVARN_WORKSPACE_TOO_SMALL = 50,
  KVARN_WORKSPACE_STALE = 51,
  KVARN_UNKNOWN_TARGET = 60,
  KVARN_TARGET_UNAVAILABLE = 61,
  KVARN_CUDA_ERROR = 70,       /* the CUDA runtime refused a launch; kvarn_last_error has its words */
  KVARN_CUDA_UNAVAILABLE = 71, /* no CUDA kernels in this build, or no device that they run on */
  KVARN_STATUS_INT32 = 0x7fffffff
} kvarn_status;

typedef enum kvarn_dtype {
  KVARN_FLOAT32 = 0,
  KVARN_FLOAT16 = 1,
  KVARN_BFLOAT16 = 2,
  KVARN_DTYPE_INT32 = 0x7fffffff /* so that any int32 is representable, and refused, in C++ too */
} kvarn_dtype;

typedef enum kvarn_encoder {
  KVARN_WEIGHTED = 0, /* default: docs/specification.md section 6 */
  KVARN_VARNORM = 1,  /* the published algorithm: section 7 */
  KVARN_ENCODER_INT32 = 0x7fffffff
} kvarn_encoder;

/* Everything that follows from (preset, head_dim, kv_heads). Filled by kvarn_layout_init; treat it as read-only. */
typedef struct kvarn_layout {
  int32_t format_version;
  int32_t k_bits, v_bits; /* 8, 4, 3 or 2 */
  int32_t page_tokens;    /* G: tokens of a tile and of a page, 128 or 64 */
  int32_t head_dim, kv_heads;
  int32_t raw_tokens_per_page;      /* n: raw tokens that fit one page; the most drafts a step may carry */
  int32_t pages_ahead;              /* m: pages a running request holds beyond ceil(tokens / G) */
  int64_t record_bytes, page_bytes; /* of one (tile, KV head); of one page = kv_heads records */
  /* Byte offsets inside a record. f16 vectors in natural order; the code matrices in fragment order (section 4). */
  int64_t k_codes, k_scale, k_zero, k_token;   /* s_k[D], z_k[D], t_k[G] */
  int64_t v_codes, v_channel, v_scale, v_zero; /* c_v[D], s_v[G], z_v[G] */
} kvarn_layout;

/* uint8 [count][page_bytes], pages `stride` bytes apart (>= page_bytes); data and stride 16-byte aligned. */
typedef struct kvarn_pages {
  uint8_t* data;
  int64_t count;
  int64_t stride;
} kvarn_pages;

/* The requests of one step. Row r of the block table names the pages of request r, one per tile, then the pages ahead.
 * seq_lens count this step's tokens. Tokens query_starts[r] .. query_starts[r+1]-1 of k, v, q are the last ones of
 * request r. A request with seq_len 0 takes no part: append writes nothing for it, attend gives zeros. */
typedef struct kvarn_batch {
  int32_t requests;
  int32_t table_width;  /* entries per row */
  int64_t table_stride; /* int32 elements from row to row, >= table_width */
  const int32_t*
      block_table; /* [requests][table_width] page indices in 0 .. count-1; entries never used may be anything */
  const int32_t* seq_lens;     /* [requests] */
  const int32_t* query_starts; /* [requests + 1], non-decreasing from 0; kvarn_expand ignores it (may be NULL) */
} kvarn_batch;

/* [tokens][heads][head_dim]; head_dim contiguous, strides in elements. */
typedef struct kvarn_rows {
  const void* data;
  kvarn_dtype dtype;
  int64_t tokens, heads;
  int64_t token_stride, head_stride;
} kvarn_rows;

typedef struct kvarn_rows_out {
  void* data;
  kvarn_dtype dtype;
  int64_t tokens, heads;
  int64_t token_stride, head_stride;
} kvarn_rows_out;

/* The caller's threads. `run` calls task(argument, i, thread) once for every i in 0 .. tasks-1, with 0 <= thread <
 * threads, no two at once on the same thread number, and returns when all are done. Results never depend on it. */
typedef void (*kvarn_task)(void* argument, int64_t index, int32_t thread);
typedef struct kvarn_executor {
  void* context;
  int32_t threads;
  void (*run)(void* context, int64_t tasks, kvarn_task task, void* argument);
} kvarn_executor;

/* How to run; a null pointer in place of it means all defaults. */
typedef struct kvarn_options {
  const kvarn_executor* executor; /* NULL: the calling thread alone */
  const char* target; /* NULL: environment KVARN_TARGET, else the best this CPU has; or a name of kvarn_targets */
} kvarn_options;

/* Scratch memory of the caller, 64-byte aligned. One buffer serves append and attend of every layer, one step at a
 * time; kvarn_workspace_bytes says how large. */
typedef struct kvarn_workspace {
  void* data;
  int64_t bytes;
} kvarn_workspace;

/* Generic text of a status, never NULL; the last error's details on this thread, "" if none. */
const char* kvarn_status_message(kvarn_status status);
const char* kvarn_last_error(void);

/* Names of the compiled targets that this CPU can run, best first, ended by NULL: "avx512", "avx2", "scalar". */
const char* const* kvarn_targets(void);
/* The target a call with this name (NULL: default) would use, or NULL (see kvarn_last_error). */
const char* kvarn_target(const char* name);

/* preset "kvarn_k{8,4,3,2}v{8,4,3,2}_g{128,64}"; head_dim 64, 80, 96, 128 or 256; kv_heads 1 .. 1024.
 * The documented presets, ended by NULL, are listed by kvarn_presets. */
kvarn_status kvarn_layout_init(const char* preset, int32_t head_dim, int32_t kv_heads, kvarn_layout* layout);
const char* const* kvarn_presets(void);

/* Bytes that a step of at most `tokens` new tokens in at most `requests` requests needs, for sequences of up to
 * max_seq_len tokens, query_heads query heads (0: append only) and an executor of `threads` threads. */
kvarn_status kvarn_workspace_bytes(const kvarn_layout* layout, int64_t tokens, int64_t requests, int64_t query_heads,
                                   int64_t max_seq_len, int32_t threads, int64_t* bytes);

/* Rotates the step's k and v, writes them raw, and packs every tile that completed.
 *
 * k, v      [query_starts[requests]][kv_heads][head_dim], any dtype each
 * feedback  NULL, or float [kv_heads][head_dim][head_dim] (KVARN_WEIGHTED only): K is rounded for the queries that will
 *           read it (section 6). Of a head's matrix what is above the diagonal counts, and any bits are allowed.
 *           Records depend on it: give a cache the same one for its whole life
 * balance   NULL, or float [kv_heads][head_dim], powers of two: k is divided by it, exactly (section 2). kvarn_attend
 *           of these pages must have the same one, which multiplies q: no product changes, but K's steps do
 * replaced  NULL, or where the number of replaced elements is stored: NaN becomes 0, and magnitudes above 65504
 *           (infinities too) become 65504 with their sign, so that nothing non-finite enters a page
 * Errors    before any write; BAD_PAGE_INDEX when a page that is needed lies outside the pool
 */
kvarn_status kvarn_append(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                          const kvarn_rows* k, const kvarn_rows* v, kvarn_encoder encoder, const float* feedback,
                          const float* balance, const kvarn_workspace* workspace, const kvarn_options* options,
                          int64_t* replaced);

/* out[t][h] = softmax over the request's tokens 0 .. position(t) of (soft_cap'd) scale * q.k, times v.
 * A row in tile i reads tiles 0 .. i-1 packed and tile i raw. Query head h reads KV head h / (heads / kv_heads).
 *
 * q, out    [query_starts[requests]][heads][head_dim]; heads a multiple of kv_heads, at most 64 per KV head
 * scale     finite;  soft_cap 0 (off) or > 0: score = soft_cap * tanh(score / soft_cap)
 * balance   what kvarn_append of these pages had
 * Errors    before any write; WORKSPACE_STALE when a prompt's rows need raw tiles that only the workspace of this
 *           step's append holds, and `workspace` is not that one
 */
kvarn_status kvarn_attend(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                          const kvarn_rows* q, const kvarn_rows_out* out, float scale, float soft_cap,
                          const float* balance, const kvarn_workspace* workspace, const kvarn_options* options);

/* The complete tiles of each request, dequantized in the rotated basis, one request after the other.
 * k, v      [sum over r of G * floor(seq_lens[r] / G)][kv_heads][head_dim]
 * workspace any that kvarn_workspace_bytes sized for as many threads (0 tokens are enough); its step rows are lost
 */
kvarn_status kvarn_expand(const kvarn_layout* layout, const kvarn_pages* pages, const kvarn_batch* batch,
                          const kvarn_rows_out* k, const kvarn_rows_out* v, const kvarn_workspace* workspace,
                          const kvarn_options* options);

/* The orthonormal Hadamard rotation of the last axis (section 2), its own inverse. in and out may be the same memory.
 */
kvarn_status kvarn_rotate(int32_t head_dim, const kvarn_rows* in, const kvarn_rows_out* out,
                          const kvarn_options* options);

#ifdef __cplusplus
}
#endif
#endif /* KVARN_KVARN_H_ */
