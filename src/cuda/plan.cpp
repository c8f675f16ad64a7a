// SPDX-License-Identifier: Apache-2.0
// The map of the workspace.
#include "cuda/launch.hpp"

namespace kvarn::cuda {

WorkspaceMap WorkspaceMap::make(const kvarn_layout& layout, const kvarn_cuda_limits& limits, int32_t ctas) {
  WorkspaceMap map{};
  int64_t offset = 0;
  const auto take = [&offset](int64_t bytes) {
    const int64_t start = offset;
    offset += (bytes + 255) / 256 * 256;
    return start;
  };
  const int64_t tokens = limits.tokens, requests = limits.requests;
  const int64_t group = limits.query_heads / layout.kv_heads;
  map.max_tiles = static_cast<int32_t>(most_tiles(layout, tokens, requests));
  map.max_raw_tiles = static_cast<int32_t>(most_raw_tiles(layout, tokens, requests));
  map.max_blocks = static_cast<int32_t>(tokens * group / kMinBlockColumns + requests);
  map.max_parts = static_cast<int32_t>(most_parts(layout, limits.max_seq_len));

  map.header = take(sizeof(PlanHeader));
  map.requests = take(requests * int64_t{sizeof(RequestPlan)});
  map.deferred = take(requests * int64_t{sizeof(int32_t)});
  map.layers = take(kMostLayers * int64_t{sizeof(kvarn_cuda_layer)});
  map.tiles = take(map.max_tiles * int64_t{sizeof(TilePlan)});
  map.blocks = take(map.max_blocks * int64_t{sizeof(BlockPlan)});
  map.cuts = take((ctas * int64_t{kMaxComputingWarps} + 1) * int64_t{sizeof(Cut)});
  map.counters = take(ctas * int64_t{sizeof(uint32_t)});
  map.parts = take(group > 0 ? int64_t{ctas} * map.max_parts * part_bytes(layout.head_dim) : 0);
  map.spilled = take(group > 0 ? ctas * kMaxQuads * map.max_parts * state_bytes(layout.head_dim) : 0);
  map.raw = take(map.max_raw_tiles * int64_t{layout.kv_heads} * raw_tile_bytes(layout));
  map.bytes = offset;
  return map;
}

Plan Launch::plan() const {
  const auto at = [this](int64_t offset) { return static_cast<void*>(workspace + offset); };
  return {static_cast<PlanHeader*>(at(map.header)), static_cast<RequestPlan*>(at(map.requests)),
          static_cast<int32_t*>(at(map.deferred)),  static_cast<kvarn_cuda_layer*>(at(map.layers)),
          static_cast<TilePlan*>(at(map.tiles)),    static_cast<BlockPlan*>(at(map.blocks)),
          static_cast<Cut*>(at(map.cuts)),          static_cast<uint32_t*>(at(map.counters)),
          static_cast<uint8_t*>(at(map.parts)),     static_cast<uint8_t*>(at(map.spilled)),
          static_cast<uint16_t*>(at(map.raw))};
}

}  // namespace kvarn::cuda
