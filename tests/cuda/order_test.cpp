// SPDX-License-Identifier: Apache-2.0
// Attention's order of additions and the plan's cuts, which are for GPUs, on the host: whoever computes which steps, a
// sum is the same tree; and cuts are in order, whatever the batch.
#define __device__
#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

static int __ffs(int x) { return __builtin_ffs(x); }
using std::max, std::min;

#include <gtest/gtest.h>

#include "cuda/plan_blocks.cuh"
#include "cuda/plan_cuts.cuh"
#include "format/layout.hpp"

namespace {
using namespace kvarn::cuda;

const kvarn_layout kLayout = kvarn::format::make_layout({4, 2, 128}, 128, 8);

// The plan's one block of `rows` rows of a request that has `length` tokens with them.
BlockPlan block(const PlanInputs& in, int request, int length, int rows) {
  const std::vector<TilePlan> tiles(3);  // more than the rows lie in
  return block_of(in, RequestPlan{length, rows, 0, 0, 0, 0, 0}, request, 0, tiles.data());
}
PlanInputs inputs(int window) {
  PlanInputs in{};
  in.layout = kLayout, in.group = 4, in.columns = 4 * 5, in.window = window;
  return in;
}

// A partial result: the additions that made it, and the rank of the boundary before it.
struct Part {
  std::string tree;
  int rank;
};
// Takes `part`, behind which the boundary has rank `next`, behind the others: two neighbours are added as soon as the
// boundary between them is lower than those around them.
void take(std::vector<Part>& parts, Part part, int next) {
  parts.push_back(std::move(part));
  while (parts.size() > 1 && parts.back().rank < next && parts[parts.size() - 2].rank > parts.back().rank) {
    Part later = std::move(parts.back());
    parts.pop_back();
    parts.back().tree = "(" + parts.back().tree + "+" + later.tree + ")";
  }
}
std::vector<Part> steps_of(const BlockPlan& b, int begin, int end) {
  std::vector<Part> parts;
  for (int step = begin; step < end; ++step)
    take(parts, {std::to_string(step), rank_of(b, step)}, rank_of(b, step + 1));
  return parts;
}

struct AttentionsOrder : testing::Test {
  std::mt19937 draw{7};
  int up_to(int least, int most) { return std::uniform_int_distribution<int>(least, most)(draw); }
  BlockPlan some_block(int most) {
    const int length = up_to(1, most);
    return block(inputs(up_to(0, 2) == 0 ? up_to(1, most) : 0), 0, length, up_to(1, min(length, 5)));
  }
};

TEST_F(AttentionsOrder, AnyCutsGiveTheSameTree) {
  for (int round = 0; round < 300; ++round) {
    const BlockPlan b = some_block(20000);
    const std::vector<Part> whole = steps_of(b, 0, b.steps);
    ASSERT_EQ(whole.size(), 1u);
    std::vector<int> cuts{0, b.steps};
    for (int i = up_to(0, 12); i > 0; --i) cuts.push_back(up_to(0, b.steps));
    std::sort(cuts.begin(), cuts.end());
    std::vector<Part> merged;
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      std::vector<Part> parts = steps_of(b, cuts[i], cuts[i + 1]);
      for (size_t k = 0; k < parts.size(); ++k) {
        const int next = k + 1 < parts.size() ? parts[k + 1].rank : rank_of(b, cuts[i + 1]);
        take(merged, parts[k], next);
      }
    }
    ASSERT_EQ(merged.size(), 1u);
    ASSERT_EQ(merged[0].tree, whole[0].tree);
  }
}

TEST_F(AttentionsOrder, StretchesLeaveAsManyPartsAsTheCutsTell) {
  for (int round = 0; round < 3000; ++round) {
    const BlockPlan b = some_block(300000);
    const int begin = up_to(0, b.steps - 1), end = up_to(begin + 1, min(begin + 400, b.steps));
    const auto left = static_cast<int>(steps_of(b, begin, end).size());
    ASSERT_EQ(remains(b, begin, end), left) << begin << " to " << end << " of " << b.steps;
    ASSERT_LE(left, most_parts(kLayout, 300000));
  }
}

struct Batch {
  PlanInputs in{};
  std::vector<BlockPlan> blocks;
  Costs cost{};
  int least = 1 << 30, most = 0;

  void add(int length, int rows) {
    BlockPlan b = block(in, static_cast<int>(blocks.size()), length, rows);
    b.weight_before = cost.weight, b.steps_before = cost.steps;
    cost.weight += int64_t{weight_of(b)} * in.layout.kv_heads;
    cost.steps += b.steps * in.layout.kv_heads;
    least = min(least, b.start / in.layout.page_tokens), most = max(most, b.start / in.layout.page_tokens);
    blocks.push_back(b);
  }
  Cut cut(int cta) const {
    return cut_of_cta(in, blocks.data(), static_cast<int>(blocks.size()), cost, nearly_even(least, most), cta);
  }
  // A step that there is, and its number.
  void expect_place(const Cut& cut) const {
    if (cut.block == static_cast<int>(blocks.size())) {
      EXPECT_EQ(cut.number, cost.steps);
      return;
    }
    const BlockPlan& b = blocks.at(cut.block);
    EXPECT_TRUE(cut.head >= 0 && cut.head < in.layout.kv_heads && cut.step >= 0 && cut.step < b.steps);
    EXPECT_EQ(cut.number, b.steps_before + cut.head * b.steps + cut.step);
  }
};

TEST_F(AttentionsOrder, CutsAreInOrderWhateverTheBatch) {
  for (int round = 0; round < 3000 && !HasFailure(); ++round) {
    Batch batch;
    batch.in = inputs(up_to(0, 3) == 0 ? 600 : 0);
    batch.in.ctas = std::vector{132, 108, 20, 1}[up_to(0, 3)];
    batch.in.teams = std::vector{8, 16, 12, 5, 3}[up_to(0, 4)];
    const int requests = up_to(0, 1) != 0 ? up_to(1, 6) : up_to(1, 200), rows = up_to(1, 4),
              base = up_to(1, up_to(0, 1) != 0 ? 3000 : 20000), spread = up_to(0, 2) == 0 ? 20000 : up_to(0, base / 8);
    for (int r = 0; r < requests; ++r) batch.add(base + rows + up_to(0, spread), rows);

    EXPECT_EQ(batch.cut(0).number, 0);
    EXPECT_EQ(batch.cut(batch.in.ctas).number, batch.cost.steps);
    for (int cta = 0; cta < batch.in.ctas; ++cta) {
      const Cut begin = batch.cut(cta), end = batch.cut(cta + 1);
      batch.expect_place(begin);
      EXPECT_LE(begin.number, end.number);
      int before = begin.number;
      for (int list = 1; list < batch.in.teams; ++list) {
        const Cut cut = cut_of_list(batch.in, batch.blocks.data(), static_cast<int>(batch.blocks.size()), begin, end,
                                    batch.cost, list);
        batch.expect_place(cut);
        EXPECT_LE(before, cut.number);
        before = cut.number;
      }
      EXPECT_LE(before, end.number);
    }
  }
}

}  // namespace
