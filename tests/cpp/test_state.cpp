// State by parameter: it follows its parameter through any change of buckets.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "state/pages.h"
#include "state/state_store.h"

namespace arc_topk {
namespace {

class StateTest : public ::testing::TestWithParam<FeedbackKind> {
 protected:
  StateTest() {
    config_.feedback = GetParam();
    for (const auto& shape : {std::vector<int64_t>{40, 24}, {7}, {30, 16}, {1}, {64, 8}}) {
      parameters_.push_back(at::empty(shape));
    }
  }

  std::vector<at::Tensor> pick(const std::vector<int>& indices) const {
    std::vector<at::Tensor> picked;
    for (const int i : indices) picked.push_back(parameters_[i]);
    return picked;
  }

  static BucketState& bucket_for(StateStore& store, const Parameters& parameters,
                                 const at::Tensor& buffer) {
    BucketState* const known = store.find(parameters, buffer);
    return known != nullptr ? *known : store.make(parameters, buffer, [](BucketState&) {});
  }

  BucketState& bucket(StateStore& store, const std::vector<int>& indices) const {
    const Parameters parameters = pick(indices);
    int64_t numel = 0;
    for (const at::Tensor& parameter : parameters) numel += parameter.numel();
    return bucket_for(store, parameters, at::zeros({numel}));
  }

  // Fills a bucket's arenas with numbers that tell parameter, array and element.
  static void fill(BucketState& state, const std::vector<int>& indices) {
    int array = 0;
    for (at::Tensor* arena : {&state.own_a, &state.own_b, &state.shared}) {
      ++array;
      if (!arena->defined()) continue;
      for (size_t i = 0; i < indices.size(); ++i) {
        const Segment& s = state.plan.segments[i];
        arena->narrow(0, s.offset, s.numel)
            .copy_(at::arange(s.numel) + 10000 * array + 100000 * indices[i]);
      }
    }
  }

  static void expect_filled(const BucketState& state, const std::vector<int>& indices) {
    int array = 0;
    for (const at::Tensor* arena : {&state.own_a, &state.own_b, &state.shared}) {
      ++array;
      if (!arena->defined()) continue;
      for (size_t i = 0; i < indices.size(); ++i) {
        const Segment& s = state.plan.segments[i];
        const at::Tensor expected = at::arange(s.numel) + 10000 * array + 100000 * indices[i];
        EXPECT_TRUE(arena->narrow(0, s.offset, s.numel).equal(expected.to(at::kFloat)))
            << "array " << array << ", parameter " << indices[i];
      }
    }
  }

  Config config_;
  std::vector<at::Tensor> parameters_;
};

TEST_P(StateTest, AWarmUpMakesABucketAnewEightTimesAndInNoOtherStep) {
  config_.start_step = 3;
  config_.warmup_steps = 20;
  StateStore store(config_, 2);
  BucketState* state = &bucket(store, {0, 1, 2, 3, 4});
  std::vector<uint64_t> made;
  int64_t kept = state->plan.num_picks;
  for (uint64_t step = 0; step < 40; ++step) {
    state->progress->exchanges = step;
    if (!store.outgrown(*state)) continue;
    made.push_back(step);
    const at::Tensor buffer = at::zeros({state->plan.numel});
    state = &store.make(pick({0, 1, 2, 3, 4}), buffer, [](BucketState&) {});
    EXPECT_EQ(state->progress->exchanges, step);
    kept = state->plan.num_picks;
  }
  EXPECT_EQ(made, (std::vector<uint64_t>{6, 8, 11, 13, 16, 18, 21, 23}));
  config_.warmup_steps = 0;
  StateStore plain(config_, 2);
  EXPECT_EQ(kept, bucket(plain, {0, 1, 2, 3, 4}).plan.num_picks);
  state->progress->failed = true;
  state->progress->exchanges = 0;
  EXPECT_FALSE(store.outgrown(*state));  // it is this one that refuses its next step
}

TEST_P(StateTest, ArraysAreThoseOfTheFeedback) {
  StateStore store(config_, 2);
  const BucketState& state = bucket(store, {0, 1, 2});
  const int own = own_states(GetParam());
  EXPECT_EQ(state.own_a.defined(), own > 0);
  EXPECT_EQ(state.own_b.defined(), own > 1);
  EXPECT_EQ(state.shared.defined(), shares_estimate(GetParam()));
}

TEST_P(StateTest, TheSameParametersAreTheSameBucket) {
  StateStore store(config_, 2);
  BucketState& state = bucket(store, {0, 1, 2});
  EXPECT_EQ(&bucket(store, {0, 1, 2}), &state);
  EXPECT_NE(&bucket(store, {3, 4}), &state);
  EXPECT_EQ(&bucket(store, {0, 1, 2}), &state);
}

TEST_P(StateTest, ValuesFollowTheirParameters) {
  StateStore store(config_, 2);
  const std::vector<std::vector<std::vector<int>>> layouts = {
      {{0, 1, 2}, {3, 4}}, {{4, 2}, {1, 3, 0}}, {{0}, {2, 1, 4, 3}}, {{3, 4, 0, 1, 2}}};
  for (const auto& indices : layouts[0]) {
    BucketState& state = bucket(store, indices);
    fill(state, indices);
    state.progress->exchanges = 5;
  }
  for (size_t i = 1; i < layouts.size(); ++i) {
    for (const auto& indices : layouts[i]) {
      const BucketState& state = bucket(store, indices);
      expect_filled(state, indices);
      EXPECT_EQ(state.progress->exchanges, 5U);
    }
  }
}

TEST_P(StateTest, ABucketThatAValueHasLeftIsKnownNoMore) {
  StateStore store(config_, 2);
  bucket(store, {0, 1, 2});
  fill(bucket(store, {2, 3}), {2, 3});
  const BucketState& again = bucket(store, {0, 1, 2});
  for (const at::Tensor* arena : {&again.own_a, &again.own_b, &again.shared}) {
    if (!arena->defined()) continue;
    const Segment& moved = again.plan.segments[2];
    EXPECT_GT(arena->narrow(0, moved.offset, moved.numel).sum().item<float>(), 0);
  }
}

TEST_P(StateTest, StartedOnlyIfEveryEstimateIs) {
  if (!shares_estimate(GetParam())) GTEST_SKIP() << "no estimate";
  StateStore store(config_, 2);
  bucket(store, {0, 1}).started = true;
  bucket(store, {2, 3, 4}).started = false;
  EXPECT_FALSE(bucket(store, {0, 2}).started);
  StateStore other(config_, 2);
  bucket(other, {0, 1}).started = true;
  bucket(other, {2, 3, 4}).started = true;
  EXPECT_TRUE(bucket(other, {4, 2, 1, 0}).started);
}

TEST_P(StateTest, StreamsTellParametersApartForGood) {
  config_.compressor = "rand_k";
  StateStore store(config_, 2);
  bucket(store, {0, 1, 2});
  bucket(store, {3, 4});
  const BucketState& state = bucket(store, {4, 2, 0, 3, 1});
  const std::vector<uint32_t> expected = {4, 2, 0, 3, 1};
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_EQ(state.plan.segments[i].stream, expected[i]);
}

TEST_P(StateTest, ABufferOfAnotherSizeIsRefused) {
  StateStore store(config_, 2);
  EXPECT_THROW(bucket_for(store, pick({0, 1}), at::zeros({5})), std::invalid_argument);
  EXPECT_THROW(bucket_for(store, pick({0}), at::zeros({960}, at::kInt)), std::invalid_argument);
}

std::string name_of_feedback(const ::testing::TestParamInfo<FeedbackKind>& info) {
  const char* const names[] = {"none", "ef14", "ef21", "ef21m"};
  return names[static_cast<int>(info.param)];
}

TEST(Pages, WhatIsForgottenIsGoneAndWhatLiesBesideItStays) {
#ifndef __linux__
  GTEST_SKIP() << "no madvise";
#endif
  const int64_t numel = 3 << 20;
  at::Tensor memory = at::ones({numel});
  at::Tensor middle = memory.narrow(0, 1000, numel - 3000);
  forget(middle.mutable_data_ptr(), middle.nbytes());
  EXPECT_TRUE(memory.narrow(0, 0, 1000).equal(at::ones({1000})));
  EXPECT_TRUE(memory.narrow(0, numel - 2000, 2000).equal(at::ones({2000})));
  EXPECT_LE(middle.sum().item<float>(), 32768);  // of pages of up to 64 KiB, one on either side
  forget(memory.mutable_data_ptr(), 0);
}

INSTANTIATE_TEST_SUITE_P(Feedback, StateTest,
                         ::testing::Values(FeedbackKind::kNone, FeedbackKind::kEF14,
                                           FeedbackKind::kEF21, FeedbackKind::kEF21M),
                         name_of_feedback);

TEST(Shape, RowsAreTheSlowestDimension) {
  const at::Tensor plain = at::empty({8, 4, 3, 3});
  EXPECT_EQ(shape_of(plain.sizes(), plain.strides()).rows, 8);
  const at::Tensor last = plain.to(at::MemoryFormat::ChannelsLast);
  EXPECT_EQ(shape_of(last.sizes(), last.strides()).rows, 8);
  const at::Tensor transposed = at::empty({5, 9}).t();
  EXPECT_EQ(shape_of(transposed.sizes(), transposed.strides()).rows, 5);
  const at::Tensor scalar = at::empty({});
  EXPECT_EQ(shape_of(scalar.sizes(), scalar.strides()).numel, 1);
  const at::Tensor empty = at::empty({0, 5});
  EXPECT_EQ(shape_of(empty.sizes(), empty.strides()).numel, 0);
}

}  // namespace
}  // namespace arc_topk
