// Config::check_every: ranks that have come apart are told so, all of them.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "error_of.h"
#include "exchange/check.h"
#include "exchange/exchange.h"
#include "thread_group.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::error_of;
using ::arc_topk::testing::on_ranks;
using ::arc_topk::testing::ThreadGroup;
using Group = c10::intrusive_ptr<ThreadGroup>;

constexpr int kRanks = 3;
constexpr int kEvery = 3;  // the third step, the sixth, ...

struct Case {
  const char* compressor;
  FeedbackKind feedback;
  int collective;  // of the step, that a rank gets something else from
  int step;        // the one in which it does, from 0
  const char* what;
};

// One bucket; what each rank throws in each step.
std::vector<std::vector<std::string>> errors_of(const Case& c, Config config, int steps,
                                                std::vector<int>* collectives = nullptr) {
  config.compressor = c.compressor;
  config.feedback = c.feedback;
  config.ratio = 0.2;
  std::vector<std::vector<std::string>> errors(kRanks);
  on_ranks(kRanks, [&](int rank, const Group& group) {
    Exchange exchange(config, {group, nullptr});
    const std::vector<at::Tensor> parameters = {at::empty({40, 8}), at::empty({5})};
    exchange.bind(parameters, {"weight", "bias"}, false);
    for (int step = 0; step < steps; ++step) {
      const int before = group->collectives;
      if (rank == 1 && step == c.step) {
        group->corrupt = [&, before](at::Tensor& arrived) {
          if (group->collectives - before != c.collective + 1) return;
          // The last byte of an element: of its sign and exponent, or of an index.
          at::Tensor bytes = arrived.view(at::kByte);
          for (int64_t i = 0; i < bytes.numel(); i += 7) bytes.narrow(0, i, 1).bitwise_xor_(1);
        };
      }
      const at::Tensor buffer = at::randn({325}) + rank;
      errors[rank].push_back(error_of([&] { exchange.run(buffer, parameters); }));
      if (collectives != nullptr && rank == 0) collectives->push_back(group->collectives - before);
      group->corrupt = nullptr;
    }
  });
  return errors;
}

TEST(Check, ARankThatGotSomethingElseIsFoundOnEveryRank) {
  const std::string rows = "the selected rows of rank 0 differ from those of rank 1";
  const std::string result = "the averaged gradients of rank 0 differ from those of rank 1";
  const Case cases[] = {
      {"arc_topk", FeedbackKind::kNone, 0, 2, rows.c_str()},
      {"arc_topk", FeedbackKind::kEF14, 0, 2, rows.c_str()},
      {"arc_topk", FeedbackKind::kEF14, 1, 2, result.c_str()},
      {"arc_topk", FeedbackKind::kEF21, 0, 2, rows.c_str()},
      {"arc_topk", FeedbackKind::kEF21, 0, 0, result.c_str()},   // h from its very beginning on
      {"arc_topk", FeedbackKind::kEF21M, 1, 1, result.c_str()},  // h two steps before the check
      {"rand_k", FeedbackKind::kNone, 0, 2, result.c_str()},
      {"rand_k", FeedbackKind::kEF14, 0, 2, result.c_str()},
      {"rand_k", FeedbackKind::kEF21M, 0, 1, result.c_str()},
      {"top_k", FeedbackKind::kNone, 0, 2, result.c_str()},
      {"top_k", FeedbackKind::kEF14, 0, 2, result.c_str()},
      {"top_k", FeedbackKind::kEF21, 0, 1, result.c_str()},
      {"dense", FeedbackKind::kEF21M, 0, 1, result.c_str()},
  };
  Config config;
  config.check_every = kEvery;
  for (const Case& c : cases) {
    SCOPED_TRACE(std::string(c.compressor) + ", feedback " +
                 std::to_string(static_cast<int>(c.feedback)) + ", collective " +
                 std::to_string(c.collective) + ", step " + std::to_string(c.step));
    const auto errors = errors_of(c, config, kEvery);
    for (int rank = 0; rank < kRanks; ++rank) {
      EXPECT_EQ(errors[rank][0] + errors[rank][1], "");
      for (const std::string& words :
           {"rank " + std::to_string(rank) + ",", std::string("bucket 0"), std::string("'weight'"),
            std::string("phase check"), std::string("in step 3"), std::string(c.what)}) {
        EXPECT_NE(errors[rank][2].find(words), std::string::npos) << errors[rank][2];
      }
    }
  }
}

TEST(Check, RanksThatAgreeGoOnAndOnlyStepsThatCheckHaveACollectiveMore) {
  for (const char* compressor : {"arc_topk", "rand_k", "top_k", "dense"}) {
    for (const FeedbackKind feedback :
         {FeedbackKind::kNone, FeedbackKind::kEF14, FeedbackKind::kEF21, FeedbackKind::kEF21M}) {
      const Case fine = {compressor, feedback, 0, -1, ""};
      Config config;
      std::vector<int> without, with;
      errors_of(fine, config, 2 * kEvery, &without);
      config.check_every = kEvery;
      for (const auto& rank : errors_of(fine, config, 2 * kEvery, &with)) {
        for (const std::string& error : rank) EXPECT_EQ(error, "");
      }
      const bool plain = feedback != FeedbackKind::kEF21M && std::string(compressor) == "dense";
      for (int step = 0; step < 2 * kEvery; ++step) {
        const int more = !plain && (step + 1) % kEvery == 0 ? 1 : 0;
        EXPECT_EQ(with[step], without[step] + more) << compressor << ", step " << step;
      }
    }
  }
}

TEST(Check, OneElementThatDiffersChangesTheDigest) {
  for (const int64_t numel : {1, 3, 8, 9, 31, 64, 1000}) {
    const at::Tensor x = at::randn({numel});
    const int64_t before = digest_of(x);
    EXPECT_EQ(digest_of(x.clone()), before);
    for (int64_t i = 0; i < numel; ++i) {
      at::Tensor other = x.clone();
      other[i] += 1e-3;
      EXPECT_NE(digest_of(other), before) << i << " of " << numel;
    }
    if (numel > 1) {
      EXPECT_NE(digest_of(x.roll(1)), before);
    }
  }
  EXPECT_NE(digest_of(at::zeros({8})), digest_of(at::zeros({9})));
  EXPECT_EQ(digest_of(at::Tensor()), 0);
  EXPECT_EQ(digest_of(at::zeros({0})), digest_of(at::zeros({0})));
}

TEST(Check, OfManyRanksThatDifferSomeAreNamed) {
  std::vector<Digests> all(12, Digests{1, 2});
  EXPECT_EQ(difference(all.data(), 12), "");
  for (int rank = 1; rank < 12; ++rank) all[rank].result = 3;
  const std::string text = difference(all.data(), 12);
  EXPECT_NE(text.find("1, 2, 3, 4, 5, 6, 7, 8 and 3 more"), std::string::npos) << text;
}

}  // namespace
}  // namespace arc_topk
