// Configurations and shapes that nobody has thought of: a plan keeps its promises or is refused,
// and an engine's steps touch nothing but what is theirs (`make fuzz`: under the sanitizers).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "compress/make_plan.h"
#include "exchange/exchange.h"
#include "fuzz.h"
#include "kernels/directions.h"
#include "state/torch_types.h"
#include "thread_group.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::Chance;
using ::arc_topk::testing::fuzz_cases;
using ::arc_topk::testing::on_ranks;
using ::arc_topk::testing::ThreadGroup;

// [begin, end) of what has a place in a payload.
using Place = std::pair<int64_t, int64_t>;

// Every element once: the places, put in order, follow one another from 0 to the end.
void expect_full(std::vector<Place> places, int64_t numel) {
  std::sort(places.begin(), places.end());
  int64_t at = 0;
  for (const auto& [begin, end] : places) {
    ASSERT_EQ(begin, at);
    ASSERT_GE(end, begin);
    at = end;
  }
  ASSERT_EQ(at, numel);
}

void check_plan(const Plan& plan, const Config& config, const std::vector<Shape>& shapes) {
  ASSERT_EQ(plan.segments.size(), shapes.size());
  std::vector<Place> bucket, first, second, picks, left, directions;
  const bool gathers = config.compressor == "top_k" && !plan.dense;
  const bool of_bytes = plan.types.sends_directions() && !plan.dense;
  if (!gathers) {
    (of_bytes              ? directions
     : plan.flags_in_first ? first
                           : second)
        .push_back({plan.flags_at, plan.flags_at + plan.num_flags});
  }
  int64_t large = 0, dense_bytes = 0;
  for (const Segment& s : plan.segments) {
    bucket.push_back({s.offset, s.offset + s.numel});
    dense_bytes += s.numel * size_of(plan.types.gradient);
    if (!s.compressed()) {
      if (plan.in_place) continue;
      (s.dense_in_first ? first : second).push_back({s.packed, s.packed + s.numel});
      ASSERT_EQ(s.dense_in_first ? plan.types.sketch : plan.types.wire, plan.types.dense);
      continue;
    }
    ASSERT_GE(s.kept, 1);
    ASSERT_LE(s.kept, s.rows);
    ASSERT_GE(s.rows * s.cols, s.numel);
    ASSERT_LT(s.rows * s.cols - s.numel, s.cols);
    ASSERT_LE(s.rows, std::numeric_limits<int32_t>::max());
    ASSERT_LE(s.cols, plan.max_cols);
    ASSERT_GE(s.flag, 0);
    ASSERT_LT(s.flag, plan.num_flags);
    const bool factorises = config.compressor == "low_rank";
    if (!factorises) picks.push_back({s.pick, s.pick + s.kept});
    if (!factorises && s.has_many_rows()) {
      ASSERT_EQ(s.large, large++);
    }
    if (factorises) {
      ASSERT_LE(s.kept, s.cols);
      const int64_t at = plan.factors[static_cast<size_t>(&s - plan.segments.data())].left;
      left.push_back({at, at + s.rows * s.kept});
      first.push_back({s.sketch, s.sketch + s.rows * s.kept});
      if (plan.types.wire == DType::kU8)
        first.push_back({s.units(s.kept), s.units(s.kept) + s.kept});
      if (of_bytes) {
        const int64_t bytes = plan.factors[static_cast<size_t>(&s - plan.segments.data())].bytes;
        const int64_t column = direction_rows(s.rows) + plan.types.norm_bytes;
        directions.push_back({bytes, bytes + s.kept * column});
      }
    }
    second.push_back({s.packed, s.packed + s.kept * s.cols});
    if (config.compressor == "arc_topk") {
      first.push_back({s.sketch, s.sketch + s.rows * config.sketch_dim});
      if (plan.types.wire == DType::kU8)
        first.push_back({s.units(config.sketch_dim), s.units(config.sketch_dim) + s.rows});
    }
  }
  expect_full(bucket, plan.numel);
  expect_full(picks, plan.num_picks);
  expect_full(left, plan.num_left);
  if (!plan.in_place) {
    expect_full(first, plan.first_numel);
    expect_full(second, plan.second_numel);
    expect_full(directions, plan.direction_bytes);
    int64_t bytes = of_bytes ? plan.direction_bytes : plan.first_numel * size_of(plan.types.sketch);
    bytes += plan.second_numel * size_of(plan.types.wire);
    if (gathers) bytes += 4 * (plan.num_picks + plan.num_flags);
    ASSERT_EQ(plan.wire_bytes, bytes);
  }
  ASSERT_EQ(plan.dense_bytes, dense_bytes);
  ASSERT_EQ(plan.num_large, large);
}

TEST(Fuzz, APlanGivesEverythingAPlaceOfItsOwnOrIsRefused) {
  int refused = 0;
  for (int number = 0; number < fuzz_cases(); ++number) {
    SCOPED_TRACE("case " + std::to_string(number));
    Chance chance(number);
    const Config config = chance.config();
    std::vector<Shape> shapes(static_cast<size_t>(chance.integer(1, 9)));
    for (Shape& shape : shapes) {
      const int64_t rows =
          chance.integer(0, 20) == 0 ? 0 : chance.size(chance.integer(0, 15) == 0 ? 34 : 20);
      const int64_t cols = chance.size(12);
      const int64_t dims = chance.integer(0, 2);
      shape = {rows * cols, dims, rows, static_cast<uint32_t>(chance.integer(0, 1 << 30))};
    }
    const int world_size = static_cast<int>(chance.size(16));
    const DType type = chance.type();
    try {
      const Plan plan =
          make_plan(config, compressor_named(config.compressor), type, shapes, world_size);
      ASSERT_NO_FATAL_FAILURE(check_plan(plan, config, shapes));
    } catch (const std::invalid_argument& error) {
      ASSERT_NE(std::string(error.what()).find("expected at most"), std::string::npos);
      ++refused;
    }
  }
  EXPECT_LT(refused, fuzz_cases() * 2 / 3);
}

TEST(Fuzz, StepsOfAnyConfigurationAndShapes) {
  for (int number = 0; number < fuzz_cases(); ++number) {
    Chance chance(number);
    const Config config = chance.config();
    const auto type = scalar_type_of(chance.type());
    std::vector<at::Tensor> parameters;
    int64_t numel = 0;
    for (int64_t left = chance.integer(1, 5); left > 0; --left) {
      std::vector<int64_t> sizes;
      for (int64_t dims = chance.integer(0, 3); dims > 0; --dims) {
        sizes.push_back(chance.integer(0, 15) == 0 ? 0 : chance.size(4));
      }
      parameters.push_back(at::empty(sizes, type));
      numel += parameters.back().numel();
    }
    const int world_size = static_cast<int>(chance.integer(1, 2));
    const bool may_be_unused = chance.integer(0, 1) == 0;
    std::vector<std::string> names;
    for (const at::Tensor& parameter : parameters)
      names.push_back(std::to_string(names.size()) + c10::str(parameter.sizes()));
    std::vector<std::string> errors(world_size);
    on_ranks(world_size, [&](int rank, const c10::intrusive_ptr<ThreadGroup>& group) {
      try {
        Exchange exchange(config, {group, nullptr});
        exchange.bind(parameters, names, may_be_unused);
        for (int step = 0; step < 4; ++step) {
          at::Tensor buffer = at::full({numel}, step - 1, at::kFloat).to(type);
          if (step == 2 && rank == 0 && numel > 0)
            buffer[numel / 2] = std::numeric_limits<float>::infinity();
          const at::Tensor averaged = exchange.run(buffer, parameters);
          if (step == 3 && !averaged.isfinite().all().item<bool>())
            throw std::runtime_error("not finite");
        }
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
    });
    for (const std::string& error : errors) ASSERT_EQ(error, "") << "case " << number;
  }
}

}  // namespace
}  // namespace arc_topk
