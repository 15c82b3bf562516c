// The plan: what is compressed, and that everything in the payloads has a place of its own.
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "compress/compressor.h"
#include "compress/make_plan.h"

namespace arc_topk {
namespace {

Shape matrix(int64_t rows, int64_t cols) { return {rows * cols, 2, rows, 0}; }
Shape vector(int64_t numel) { return {numel, 1, numel, 0}; }

Plan plan_of(const Config& config, const std::vector<Shape>& shapes, DType type = DType::kF32,
             int world_size = 4) {
  return make_plan(config, compressor_named(config.compressor), type, shapes, world_size);
}

// Marks [begin, begin + count) and reports whether all of it was free.
bool take(std::vector<bool>& payload, int64_t begin, int64_t count) {
  for (int64_t i = begin; i < begin + count; ++i) {
    if (i < 0 || i >= static_cast<int64_t>(payload.size()) || payload[i]) return false;
    payload[i] = true;
  }
  return true;
}

bool full(const std::vector<bool>& payload) {
  return std::find(payload.begin(), payload.end(), false) == payload.end();
}

TEST(Plan, KeptRowsRoundUpAndForgiveTheLastBit) {
  EXPECT_EQ(kept_rows(0.1, 10), 1);
  EXPECT_EQ(kept_rows(0.1, 11), 2);
  EXPECT_EQ(kept_rows(0.07, 100), 7);
  EXPECT_EQ(kept_rows(1e-9, 5), 1);
  EXPECT_EQ(kept_rows(1.0, 5), 5);
  EXPECT_EQ(kept_rows(0.5, 1), 1);
}

TEST(Plan, EveryElementOfThePayloadsBelongsToOneTensor) {
  const std::vector<Shape> shapes = {matrix(40, 24), vector(7), matrix(1, 96), matrix(96, 1),
                                     vector(0),      vector(1), matrix(33, 70)};
  for (const char* compressor : {"arc_topk", "rand_k", "top_k", "low_rank"}) {
    for (const DType type : {DType::kF32, DType::kF64, DType::kBF16, DType::kF16}) {
      for (const int64_t row_width : {0, 1, 8}) {
        Config config;
        config.compressor = compressor;
        config.ratio = 0.1;
        if (row_width > 0) config.row_width = row_width;
        const Plan plan = plan_of(config, shapes, type);
        ASSERT_FALSE(plan.dense && row_width == 0);
        if (plan.dense) continue;  // narrow rows: the sketch costs more than it saves
        std::vector<bool> first(plan.first_numel);
        std::vector<bool> second(plan.second_numel);
        const bool gathers = std::string(compressor) == "top_k";
        if (!gathers) {
          ASSERT_TRUE(take(plan.flags_in_first ? first : second, plan.flags_at, plan.num_flags));
        }
        int64_t offset = 0;
        for (const Segment& s : plan.segments) {
          EXPECT_EQ(s.offset, offset);
          offset += s.numel;
          if (!s.compressed()) {
            EXPECT_TRUE(take(s.dense_in_first ? first : second, s.packed, s.numel));
            continue;
          }
          EXPECT_GE(s.rows * s.cols, s.numel);
          EXPECT_LT(s.rows * s.cols - s.numel, s.cols);
          EXPECT_TRUE(take(second, s.packed, s.kept * s.cols));
          if (std::string(compressor) == "arc_topk") {
            EXPECT_TRUE(take(first, s.sketch, s.rows * config.sketch_dim));
          }
          if (std::string(compressor) == "low_rank") {
            EXPECT_TRUE(take(first, s.sketch, s.rows * s.kept));
          }
        }
        EXPECT_EQ(plan.numel, offset);
        EXPECT_TRUE(full(first) && full(second));

        int64_t bytes = plan.first_numel * size_of(plan.types.work()) +
                        plan.second_numel * size_of(plan.types.wire);
        if (gathers) bytes += 4 * (plan.num_picks + plan.num_flags);
        EXPECT_EQ(plan.wire_bytes, bytes);
      }
    }
  }
}

TEST(Plan, PiecesCoverEveryElementOnce) {
  Config config;
  const Plan plan = plan_of(config, {matrix(50000, 64), matrix(3, 100000), matrix(4, 100001),
                                     matrix(100, 8193), vector(100001), vector(0)});
  for (const Grain grain : {Grain{32768, false, 1024}, Grain{8192, true, 512}}) {
    std::vector<int64_t> next(plan.segments.size(), 0);  // first element not covered yet
    for (const Piece& piece : cut_into_pieces(plan.segments, grain)) {
      const Segment& s = plan.segments[piece.segment];
      ASSERT_LT(piece.row_begin, piece.row_end);
      ASSERT_LT(piece.col_begin, piece.col_end);
      ASSERT_EQ(piece.row_begin * s.cols + piece.col_begin, next[piece.segment]);
      const bool whole_rows = piece.col_begin == 0 && piece.col_end == s.cols;
      ASSERT_TRUE(whole_rows || (grain.splits_rows && piece.row_end == piece.row_begin + 1));
      next[piece.segment] = (piece.row_end - 1) * s.cols + piece.col_end;
    }
    for (size_t i = 0; i < next.size(); ++i) {
      EXPECT_EQ(next[i], plan.segments[i].rows * plan.segments[i].cols);
    }
  }
}

TEST(Plan, WhatATensorCostsDoesNotDependOnItsBucket) {
  const std::vector<Shape> shapes = {matrix(40, 24), vector(7), matrix(96, 1), matrix(33, 70)};
  for (const char* compressor : {"arc_topk", "rand_k", "top_k", "dense", "low_rank"}) {
    for (const DType type : {DType::kF32, DType::kF64, DType::kBF16, DType::kF16}) {
      for (const int wire : {-1, 0, 2, 3, 4}) {
        Config config;
        if (wire == 4 && compressor != std::string("arc_topk")) continue;
        config.compressor = compressor;
        if (wire >= 0) config.wire_dtype = static_cast<DType>(wire);
        int64_t alone = 0;
        for (const Shape& shape : shapes) alone += plan_of(config, {shape}, type).wire_bytes;
        EXPECT_EQ(plan_of(config, shapes, type).wire_bytes, alone) << compressor;
      }
    }
  }
}

TEST(Plan, ATensorOfTooManyRowsIsRefused) {
  const int64_t most = std::numeric_limits<int32_t>::max();
  EXPECT_EQ(plan_of({}, {matrix(most, 64)}).segments[0].rows, most);
  EXPECT_EQ(plan_of({}, {vector(kMostRows)}).segments[0].rows, kMostRows);
  EXPECT_EQ(plan_of({}, {matrix(2, kMostRows)}).segments[0].cols, kMostRows);
  EXPECT_THROW(plan_of({}, {matrix(most + 1, 64)}), std::invalid_argument);
  EXPECT_THROW(plan_of({}, {vector(kMostRows + 1)}), std::invalid_argument);
  EXPECT_THROW(plan_of({}, {matrix(2, kMostRows + 1)}), std::invalid_argument);
}

TEST(Plan, ADenseBucketIsItsOwnPayload) {
  Config config;
  const Plan plan = plan_of(config, {vector(7), matrix(96, 1)});
  EXPECT_TRUE(plan.dense && plan.in_place);
  EXPECT_EQ(plan.first_numel + plan.second_numel, 0);
  EXPECT_EQ(plan.wire_bytes, plan.dense_bytes);
}

TEST(Plan, ADenseTensorIsNotRoundedToANarrowerWire) {
  Config config;
  config.wire_dtype = DType::kBF16;
  EXPECT_EQ(types_for(config, arc_top_k(), DType::kF32, 4).dense, DType::kF32);
  EXPECT_EQ(types_for(config, arc_top_k(), DType::kBF16, 4).dense, DType::kBF16);
  EXPECT_EQ(types_for(config, arc_top_k(), DType::kF16, 4).dense, DType::kF32);
  EXPECT_EQ(types_for(config, rand_k(), DType::kF32, 4).dense, DType::kBF16);  // one payload
}

TEST(Plan, BytesHaveAUnitARowAndBecomeBfloat16ForManyRanks) {
  Config config;
  config.ratio = 0.1;
  config.wire_dtype = DType::kU8;
  const std::vector<Shape> shapes = {matrix(40, 24), vector(7), matrix(33, 70)};
  for (const int world_size : {1, 32}) {
    const Plan plan = plan_of(config, shapes, DType::kF32, world_size);
    EXPECT_EQ(plan.types.wire, DType::kU8);
    EXPECT_EQ(plan.types.dense, DType::kF32);
    std::vector<bool> first(plan.first_numel);
    EXPECT_TRUE(take(first, plan.flags_at, plan.num_flags));
    for (const Segment& s : plan.segments) {
      if (!s.compressed()) {
        EXPECT_TRUE(s.dense_in_first && take(first, s.packed, s.numel));
        continue;
      }
      EXPECT_TRUE(take(first, s.sketch, s.rows * 4) && take(first, s.units(4), s.rows));
    }
    EXPECT_TRUE(full(first));
    EXPECT_EQ(plan.wire_bytes, 4 * (2 + 5 * (40 + 33) + 7) + 4 * 24 + 4 * 70);
  }
  EXPECT_EQ(plan_of(config, shapes, DType::kF32, 33).types.wire, DType::kBF16);
}

TEST(Plan, LowRankOnBytesHasNothingDenseAndTwoBytesOfNormsARank) {
  Config config;
  config.compressor = "low_rank";
  config.rank = 3;
  config.wire_dtype = DType::kU8;
  config.sketch_dtype = DType::kBF16;  // of other wires alone
  const std::vector<Shape> shapes = {matrix(40, 24), vector(7), matrix(3, 5), vector(0)};
  for (const int world_size : {1, 32}) {
    const Plan plan = make_plan(config, low_rank(), DType::kF32, shapes, world_size);
    EXPECT_TRUE(plan.types.sends_directions());
    EXPECT_EQ(plan.num_flags, 6);
    const int64_t columns = 3 + 1 + 1;
    EXPECT_EQ(plan.direction_bytes, 6 + 3 * 40 + 2 * world_size * columns);
    EXPECT_EQ(plan.second_numel, 3 * 24 + 7 + 15);
    EXPECT_EQ(plan.wire_bytes, plan.direction_bytes + plan.second_numel);
    EXPECT_EQ(plan.segments[1].rows, 1);
    EXPECT_EQ(plan.segments[2].cols, 15);
    EXPECT_FALSE(plan.segments[3].compressed());
  }
  const Plan plan = make_plan(config, low_rank(), DType::kF32, shapes, 33);
  EXPECT_EQ(plan.types.wire, DType::kBF16);
  EXPECT_EQ(plan.types.sketch, DType::kBF16);
  EXPECT_EQ(plan.direction_bytes, 0);
  EXPECT_FALSE(plan.segments[1].compressed());
}

TEST(Compressor, UnknownNamesAreListed) {
  try {
    compressor_named("topk");
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("'topk'; expected 'arc_topk'"), std::string::npos);
  }
}

}  // namespace
}  // namespace arc_topk
