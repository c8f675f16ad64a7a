// SPDX-License-Identifier: Apache-2.0
// How a CTA of attention is divided: its warps into teams, its shared memory into queries, partial results and slots.
#pragma once

#include "cuda/attend_room.cuh"

namespace kvarn::cuda {

// A warp of two quads unpacks codes once for both but is slower, 1.4 times as many instructions a tile, and needs more
// registers: worth it where a team has two such warps, not three (docs/kernels.md).
inline constexpr int32_t kTwoQuadsColumns = 16;
constexpr int32_t warp_quads_of(int32_t columns) { return columns == kTwoQuadsColumns ? 2 : 1; }
constexpr int32_t team_warps_of(int32_t columns) { return columns / (kQuadColumns * warp_quads_of(columns)); }
// Of three warps, four teams and not five: the fifteenth warp would leave one quarter of the multiprocessor with a warp
// less than the others, which whole teams wait for (docs/kernels.md).
constexpr int32_t most_teams(int32_t warps, int32_t columns) {
  return team_warps_of(columns) == 3 ? warps / 4 : warps / team_warps_of(columns);
}

// `teams` of them for blocks of `columns`, of `warps` that compute, if `limit` bytes suffice; teams 0 if not.
constexpr Division division_of(const kvarn_layout& layout, int32_t columns, int limit, int32_t warps, int32_t teams,
                               int32_t states, int32_t key_depth, int32_t value_depth) {
  const int keys = slot_bytes(layout, key_part(layout)), values = slot_bytes(layout, value_part(layout));
  const int state = static_cast<int>(state_bytes(layout.head_dim)), queries = query_bytes(layout.head_dim);
  Division d{};
  d.columns = columns, d.warps = warps, d.team_warps = team_warps_of(columns), d.warp_quads = warp_quads_of(columns);
  d.teams = teams, d.states = states, d.key_depth = key_depth, d.value_depth = value_depth;
  d.queries_at = kPiecesAt + aligned(warps * kMaxStates * int64_t{sizeof(Piece)});
  d.states_at = d.queries_at + aligned(std::max(d.quads() * queries, d.team_quads() * state));
  d.keys_at = d.states_at + aligned(int64_t{states} * d.quads() * state);
  d.values_at = d.keys_at + teams * key_depth * keys;
  const int end = d.values_at + teams * value_depth * values;
  // The end of the CTA needs no slots, but the states.
  const int ending = static_cast<int>(sizeof(Ending));
  d.bytes = std::max(end, d.keys_at + ending);
  d.ending_at = d.bytes - ending;
  return teams * key_depth > kMaxSlots || states > kMaxStates || d.bytes > limit ? Division{} : d;
}

// How many warps compute, beside those that load: as many as there is room for teams of. Of one quad they have 128
// registers, or 96 where they are 16. Two quads need the 168 that eight warps have beside four, and teams of two warps
// gain nothing from 12 (docs/kernels.md).
constexpr int32_t computing_warps(const kvarn_layout& layout, int32_t columns) {
  constexpr int kShared = 227 * 1024;  // of an sm_90; where there is less, some of the warps have nothing to do
  const auto fit = [&](int32_t warps) {
    return division_of(layout, columns, kShared, warps, most_teams(warps, columns), 1, 1, 1).teams > 0;
  };
  if (warp_quads_of(columns) == 2) return 8;
  return fit(16) ? 16 : team_warps_of(columns) == 1 && fit(12) ? 12 : 8;
}

// All warps of a CTA. Eight or twelve that compute one quad are among 16, for which there are registers; 16, and those
// of two quads, have four that load beside them.
inline constexpr int32_t kApartWarps = 16;
constexpr int32_t cta_warps(int32_t quads, int32_t computing) {
  return quads == 1 && computing < kApartWarps ? kApartWarps : computing + kLoadingWarps;
}
// What a warp of a CTA is: of those below `computing` one that computes, of others one that loads. A quarter of the
// multiprocessor runs every fourth warp, and keeps little code close: a tile's, a loader's and what happens in between
// are more than that together. So where eight warps compute, each its own list, every fourth of 16 loads, and of the
// others those that are left over. Twelve, and teams of two, gain more from a fourth quarter that computes.
constexpr int32_t role_of(int32_t warp, int32_t computing, int32_t warps, int32_t team_warps) {
  if (computing != 8 || warps != kApartWarps || team_warps != 1) return warp;
  if (warp % 4 == 3) return computing + warp / 4;
  const int32_t other = 3 * (warp / 4) + warp % 4;
  return other < computing ? other : other + kApartWarps / 4;
}
// Every role once.
constexpr bool has_all_roles() {
  uint32_t roles = 0;
  for (int32_t warp = 0; warp < kApartWarps; ++warp) roles |= 1u << role_of(warp, 8, kApartWarps, 1);
  return roles == (1u << kApartWarps) - 1;
}
static_assert(has_all_roles());

// Columns of a block: as many as the largest request of the step needs. Teams of three and of five warps are for
// kernels of 16 warps. 21 to 24 are two blocks of 12, not one of 16 and a rest in its kernel (docs/kernels.md).
constexpr int32_t block_columns(const kvarn_layout& layout, int32_t query_heads, int32_t max_query_len) {
  const int64_t columns = int64_t{max_query_len} * (query_heads / layout.kv_heads);
  if (columns <= kMinBlockColumns) return kMinBlockColumns;
  if (columns <= 8 || layout.head_dim > kTwoQuadsHeadDim) return 8;
  if (computing_warps(layout, 8) != kMaxComputingWarps) return kTwoQuadsColumns;
  if (columns > kMaxBlockColumns) return columns <= 24 ? 12 : kTwoQuadsColumns;
  return static_cast<int32_t>((columns + kQuadColumns - 1) / kQuadColumns * kQuadColumns);
}

}  // namespace kvarn::cuda
