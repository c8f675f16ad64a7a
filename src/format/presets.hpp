// SPDX-License-Identifier: Apache-2.0
// The presets: one table. A preset is a row; no code asks for one by name.
#pragma once

#include <array>
#include <optional>
#include <string_view>

namespace kvarn::format {

struct Preset {
  int k_bits, v_bits, page_tokens;
};

inline constexpr std::array kBits{8, 4, 3, 2};
inline constexpr std::array kPageTokens{128, 64};
inline constexpr std::array kHeadDims{64, 80, 96, 128, 256};
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMaxPageTokens = 128;

// The documented choices, best quality first; the other pairs are right but not tuned. NULL-terminated for the C ABI.
inline constexpr std::array<const char*, 7> kDocumentedPresets{"kvarn_k8v4_g128",
                                                               "kvarn_k4v4_g128",
                                                               "kvarn_k4v3_g128",
                                                               "kvarn_k3v3_g128",
                                                               "kvarn_k4v2_g128",
                                                               "kvarn_k2v2_g128",
                                                               nullptr};

template <class List>
constexpr bool contains(const List& list, int value) {
  for (int item : list)
    if (item == value) return true;
  return false;
}

// "kvarn_k4v2_g128" -> {4, 2, 128}; nullopt for anything that is not exactly of that form.
constexpr std::optional<Preset> parse_preset(std::string_view name) {
  const auto take = [&name](std::string_view prefix) {
    if (name.substr(0, prefix.size()) != prefix) return false;
    name.remove_prefix(prefix.size());
    return true;
  };
  const auto digit = [&name] {
    const int value = name.empty() ? -1 : name.front() - '0';
    if (!name.empty()) name.remove_prefix(1);
    return value;
  };
  Preset preset{};
  if (!take("kvarn_k")) return std::nullopt;
  preset.k_bits = digit();
  if (!take("v")) return std::nullopt;
  preset.v_bits = digit();
  if (name == "_g128") preset.page_tokens = 128;
  if (name == "_g64") preset.page_tokens = 64;
  if (!contains(kBits, preset.k_bits) || !contains(kBits, preset.v_bits) || preset.page_tokens == 0)
    return std::nullopt;
  return preset;
}

}  // namespace kvarn::format
