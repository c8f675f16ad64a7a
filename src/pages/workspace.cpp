// SPDX-License-Identifier: Apache-2.0
#include "pages/workspace.hpp"

namespace kvarn {

uint64_t fingerprint(const Step& step) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a over 64-bit words
  const auto mix = [&hash](uint64_t value) { hash = (hash ^ value) * 0x100000001b3; };
  mix(reinterpret_cast<uint64_t>(step.pages.data));
  mix(static_cast<uint64_t>(step.layout.record_bytes));
  mix(static_cast<uint64_t>(step.batch.requests));
  for (int32_t r = 0; r < step.batch.requests; ++r) {
    mix(static_cast<uint64_t>(step.batch.seq_lens[r]));
    mix(static_cast<uint64_t>(step.batch.query_starts[r + 1]));
    if (step.length(r) > 0) mix(static_cast<uint64_t>(step.batch.block_table[r * step.batch.table_stride]));
  }
  return hash;
}

void fill_row_base(const Step& step, int64_t* row_base) {
  int64_t staged_before = 0;
  for (int32_t r = 0; r < step.batch.requests; ++r) {
    row_base[r] = step.batch.query_starts[r] + staged_before;
    staged_before += step.staged(r);
  }
}

RawTile raw_tile(const Step& step, const Workspace& workspace, int32_t request, int32_t tile, int32_t head,
                 int32_t tokens) {
  RawTile out;
  const int32_t first = tile * step.layout.page_tokens;
  if (format::raw_in_pages(step.layout, tile, step.length(request))) {
    for (int32_t t = 0; t < tokens; ++t) {
      out.k[t] = step.raw_k(request, first + t, head);
      out.v[t] = out.k[t] + step.raw_v_distance();
    }
  } else {
    const int64_t base = workspace.row_base()[request] + first - (step.start(request) - step.staged(request));
    for (int32_t t = 0; t < tokens; ++t) {
      out.k[t] = workspace.row(base + t, head);
      out.v[t] = out.k[t] + step.layout.head_dim;
    }
  }
  return out;
}

}  // namespace kvarn
