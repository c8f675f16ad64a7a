// SPDX-License-Identifier: Apache-2.0
// The laws of the layout: every code has its own bits, raw tokens never collide where the design says they do not.
#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "format/float16.hpp"
#include "format/fragment.hpp"
#include "format/layout.hpp"
#include "format/raw.hpp"

namespace kvarn::format {
namespace {

TEST(Fragment, EveryBitOfAMatrixIsUsedOnce) {
  for (int d : kHeadDims)
    for (int g : kPageTokens)
      for (int bits : kBits)
        for (auto [rows, columns] : {std::pair{g, d}, std::pair{d, g}}) {
          const Planes planes = make_planes(rows, columns, bits);
          int64_t total = 0;
          for (int p = 0; p < planes.count; ++p) {
            const Plane& plane = planes.plane[p];
            total += plane.bytes();
            std::vector<bool> used(static_cast<size_t>(8 * plane.bytes()));
            for (int r = 0; r < rows; ++r)
              for (int c = 0; c < columns; ++c) {
                const CodePlace at = code_place(plane, r, c);
                ASSERT_LE(at.bit + plane.width, 8);
                for (int b = at.bit; b < at.bit + plane.width; ++b) {
                  const auto index = static_cast<size_t>(8 * at.byte + b);
                  ASSERT_LT(index, used.size());
                  ASSERT_FALSE(used[index]) << rows << "x" << columns << " bits " << bits << " at " << r << "," << c;
                  used[index] = true;
                }
              }
          }
          EXPECT_EQ(total, int64_t{rows} * columns * bits / 8);
        }
}

TEST(Fragment, AWarpReadsEveryBankOnce) {
  // 8 lanes of a phase read 16-byte units: 2 adjacent units (rows) of 4 adjacent steps (columns).
  const Plane plane = make_plane(128, 128, 4, 0);
  for (int unit = 0; unit < 4; unit += 2) {
    std::set<int64_t> banks;
    for (int u = unit; u < unit + 2; ++u)
      for (int step = 4; step < 8; ++step) banks.insert(code_place(plane, 4 * u, 4 * step).byte / 16 % 8);
    EXPECT_EQ(banks.size(), 8u);
  }
}

TEST(Raw, TokensOfATileAndTheDraftsBehindItNeverCollide) {
  for (int d : kHeadDims)
    for (int g : kPageTokens)
      for (int k : kBits)
        for (int v : kBits) {
          const kvarn_layout layout = make_layout({k, v, g}, d, 1);
          const int n = layout.raw_tokens_per_page, m = layout.pages_ahead;
          ASSERT_GE(n, 1);
          std::set<std::pair<int, int>> places;
          for (int position = g; position < 2 * g + std::min(n, g); ++position) {  // tile 1 and n drafts
            const RawPlace at = raw_place(layout, position);
            EXPECT_TRUE(places.insert({at.page, at.slot}).second);
            EXPECT_GT(at.page, 1);
            EXPECT_LT(at.page, pages_of(layout, position + 1));
            EXPECT_LT(at.slot, n);
          }
          EXPECT_EQ(m, (g + n - 1) / n);
          EXPECT_LE(2 * raw_v_offset(layout, n), 2 * layout.record_bytes);
        }
}

TEST(Raw, StagingStartsOneTokenPastTheDrafts) {
  const kvarn_layout layout = make_layout({4, 2, 128}, 128, 1);  // n = 27
  EXPECT_FALSE(must_stage(layout, 100, 128 + 27));
  EXPECT_TRUE(must_stage(layout, 100, 128 + 28));
  EXPECT_FALSE(must_stage(layout, 128, 1000));
}

TEST(Preset, ParsesExactlyItsForm) {
  EXPECT_TRUE(parse_preset("kvarn_k4v2_g128") && parse_preset("kvarn_k3v3_g64"));
  for (const char* bad :
       {"", "kvarn", "kvarn_k4v2", "kvarn_k4v2_g12", "kvarn_k4v2_g1280", "kvarn_k5v2_g128", "kvarn_k4v0_g64",
        "kvarn_k16v2_g128", "KVARN_k4v2_g128", " kvarn_k4v2_g128", "kvarn_k4v2_g128 ", "kvarn_k4x2_g128"})
    EXPECT_FALSE(parse_preset(bad)) << bad;
}

TEST(Float16, RoundTripsEveryHalf) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float value = f16_to_float(static_cast<uint16_t>(h));
    if (value == value) {
      EXPECT_EQ(float_to_f16(value), h);
    }
  }
}

TEST(Float16, RoundsHalfwayToEven) {
  for (uint16_t h = 0; h < 0x7bff; ++h) {
    const float low = f16_to_float(h), high = f16_to_float(static_cast<uint16_t>(h + 1)), middle = (low + high) / 2;
    EXPECT_EQ(float_to_f16(middle), h % 2 == 0 ? h : h + 1);
  }
  EXPECT_EQ(float_to_f16_saturating(1e9f), 0x7bff);
  EXPECT_EQ(float_to_f16_saturating(-1e9f), 0xfbff);
}

}  // namespace
}  // namespace kvarn::format
