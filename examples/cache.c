/* SPDX-License-Identifier: Apache-2.0
 * The C ABI in one page: a request of 300 tokens is appended and attended, then one token is decoded.
 *
 *   cc cache.c $(pkg-config --cflags --libs --static kvarn) -o cache && ./cache
 */
#include <kvarn/kvarn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kTokens = 300, kKvHeads = 2, kQueryHeads = 8, kHeadDim = 128 };

static int check(kvarn_status status, const char* what) {
  if (status != KVARN_OK) fprintf(stderr, "%s: %s (%s)\n", what, kvarn_last_error(), kvarn_status_message(status));
  return status == KVARN_OK;
}

static float* random_rows(size_t count) {
  float* x = malloc(count * sizeof *x);
  for (size_t i = 0; i < count; ++i) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
  return x;
}

int main(void) {
  kvarn_layout layout;
  if (!check(kvarn_layout_init("kvarn_k4v2_g128", kHeadDim, kKvHeads, &layout), "layout")) return 1;

  const int total = kTokens + 1;
  const int32_t width = (total + layout.page_tokens - 1) / layout.page_tokens + layout.pages_ahead;
  const kvarn_pages pages = {aligned_alloc(64, (size_t)(width * layout.page_bytes)), width, layout.page_bytes};
  int32_t table[64];
  for (int32_t i = 0; i < width; ++i) table[i] = width - 1 - i; /* any order */

  int64_t bytes;
  if (!check(kvarn_workspace_bytes(&layout, kTokens, 1, kQueryHeads, total, 1, &bytes), "workspace")) return 1;
  const kvarn_workspace workspace = {aligned_alloc(64, (size_t)bytes), bytes};

  float* k = random_rows((size_t)total * kKvHeads * kHeadDim);
  float* v = random_rows((size_t)total * kKvHeads * kHeadDim);
  float* q = random_rows((size_t)total * kQueryHeads * kHeadDim);
  float* out = malloc((size_t)total * kQueryHeads * kHeadDim * sizeof *out);

  const int steps[2] = {kTokens, 1};
  int32_t length = 0;
  for (int step = 0; step < 2; ++step) {
    const int64_t first = length, count = steps[step], kv = kKvHeads * kHeadDim, qv = kQueryHeads * kHeadDim;
    const int32_t starts[2] = {0, (int32_t)count};
    length += (int32_t)count;
    const kvarn_batch batch = {1, width, width, table, &length, starts};
    const kvarn_rows k_rows = {k + first * kv, KVARN_FLOAT32, count, kKvHeads, kv, kHeadDim};
    const kvarn_rows v_rows = {v + first * kv, KVARN_FLOAT32, count, kKvHeads, kv, kHeadDim};
    const kvarn_rows q_rows = {q + first * qv, KVARN_FLOAT32, count, kQueryHeads, qv, kHeadDim};
    const kvarn_rows_out out_rows = {out + first * qv, KVARN_FLOAT32, count, kQueryHeads, qv, kHeadDim};
    if (!check(
            kvarn_append(&layout, &pages, &batch, &k_rows, &v_rows, KVARN_WEIGHTED, NULL, NULL, &workspace, NULL, NULL),
            "append"))
      return 1;
    if (!check(kvarn_attend(&layout, &pages, &batch, &q_rows, &out_rows, 0.0884f, 0.0f, NULL, &workspace, NULL),
               "attend"))
      return 1;
  }
  for (int64_t i = 0; i < (int64_t)total * kQueryHeads * kHeadDim; ++i)
    if (!isfinite(out[i])) return 1;
  printf("%s: %d tokens in %lld bytes a page of %d tokens, 16-bit would take %d\n", kvarn_target(NULL), length,
         (long long)layout.page_bytes, layout.page_tokens, layout.page_tokens * kKvHeads * kHeadDim * 4);
  free(pages.data), free(workspace.data), free(k), free(v), free(q), free(out);
  return 0;
}
