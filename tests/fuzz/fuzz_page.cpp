// SPDX-License-Identifier: Apache-2.0
// The page reader: pages, block table and lengths are the fuzzer's. Every target must come back with a status, touch
// nothing outside its memory, and all targets must expand the same bytes to the same bits.
#include <cstring>
#include <vector>

#include "kvarn/kvarn.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr int kPages = 8, kWidth = 10, kHeads = 4, kD = 64;
  static const char* const kPresets[] = {"kvarn_k4v2_g64", "kvarn_k3v3_g64", "kvarn_k2v2_g64", "kvarn_k8v8_g64"};
  if (size < 16) return 0;
  kvarn::Layout layout{};
  if (!kvarn::Layout::make(kPresets[data[0] % 4], kD, 1, layout)) __builtin_trap();
  const kvarn::WorkspaceBuffer memory(kPages * layout.page_bytes);
  const kvarn_pages pages{static_cast<uint8_t*>(static_cast<kvarn_workspace>(memory).data), kPages, layout.page_bytes};
  for (int64_t i = 0; i < kPages * layout.page_bytes; ++i)
    pages.data[i] = data[(static_cast<size_t>(i) * 31 + 14) % size];

  int32_t table[kWidth], length = static_cast<int32_t>(data[1] | data[2] << 8) % 400 - 4,
                         starts[2] = {0, static_cast<int8_t>(data[3])};
  for (int i = 0; i < kWidth; ++i) table[i] = static_cast<int8_t>(data[4 + i]) % (kPages + 1);
  const kvarn_batch batch{1, kWidth, kWidth, table, &length, starts};

  const kvarn::WorkspaceBuffer workspace(layout.workspace_bytes(256, 1, kHeads, 400));
  std::memset(static_cast<kvarn_workspace>(workspace).data, 0, 64);
  const int64_t queries = starts[1] > 0 ? starts[1] : 0, tokens = length > 0 ? length / 64 * 64 : 0;
  std::vector<float> q(static_cast<size_t>(queries * kHeads * kD) + 1, .25f), out(q.size());
  std::vector<float> first, k(static_cast<size_t>(tokens * kD) + 1), v(k.size());
  for (const char* const* target = kvarn_targets(); *target != nullptr; ++target) {
    const kvarn_options options{nullptr, *target};
    (void)kvarn::attend(layout, pages, batch, kvarn::rows(q.data(), KVARN_FLOAT32, queries, kHeads, kD),
                        kvarn::rows_out(out.data(), KVARN_FLOAT32, queries, kHeads, kD), {}, workspace, &options);
    if (!kvarn::expand(layout, pages, batch, kvarn::rows_out(k.data(), KVARN_FLOAT32, tokens, 1, kD),
                       kvarn::rows_out(v.data(), KVARN_FLOAT32, tokens, 1, kD), workspace, &options))
      continue;
    k.insert(k.end(), v.begin(), v.end());
    if (first.empty()) first = k;
    for (size_t i = 0; i < k.size(); ++i)  // NaN payloads may differ
      if (std::memcmp(&first[i], &k[i], 4) != 0 && (first[i] == first[i] || k[i] == k[i])) __builtin_trap();
    k.resize(v.size());
  }
  return 0;
}
