// The equations of error feedback, one element at a time, over some steps of a random run.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "feedback/feedback.h"

namespace arc_topk {
namespace {

struct Draw {
  double g;
  double share;  // of the message that is sent
};

std::vector<Draw> some_steps() {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  std::vector<Draw> steps(50);
  for (size_t t = 0; t < steps.size(); ++t) steps[t] = {normal(random), t % 3 == 0 ? 0.75 : 0.0};
  return steps;
}

TEST(Feedback, NoneSendsTheGradient) {
  double a = 1, b = 2;
  NoFeedback().prepare(3.0, a, b);
  EXPECT_EQ(NoFeedback().message(3.0, a, b), 3.0);
  NoFeedback().sent(3.0, a, b);
  EXPECT_EQ(a, 1);
  EXPECT_EQ(b, 2);
}

// C_i + e_i = g_i + e_i(old).
TEST(Feedback, EF14KeepsWhatWasNotSent) {
  double e = 0, unused = 0;
  for (const Draw& step : some_steps()) {
    const double expected = step.g + e;
    EF14().prepare(step.g, e, unused);
    EXPECT_EQ(EF14().message(step.g, e, unused), expected);
    const double c = step.share * expected;
    EF14().sent(c, e, unused);
    EXPECT_EQ(e, expected - c);
  }
}

TEST(Feedback, EF21SendsTheDifferenceToItsEstimate) {
  double h = 0, unused = 0;
  for (const Draw& step : some_steps()) {
    const double old = h;
    EF21().prepare(step.g, h, unused);
    const double x = EF21().message(step.g, h, unused);
    EXPECT_EQ(x, step.g - old);
    EF21().sent(step.share * x, h, unused);
    EXPECT_EQ(h, old + step.share * x);
  }
}

// As the paper writes it: v = (1 - eta) v + eta g, X = v - h_i, h_i += C_i.
TEST(Feedback, EF21MTracksTheMomentum) {
  const EF21M<double> feedback{0.1, 0.9};
  double tracker = 0, estimate = 0, v = 0, h = 0;
  for (const Draw& step : some_steps()) {
    v = 0.9 * v + 0.1 * step.g;
    feedback.prepare(step.g, tracker, estimate);
    const double x = feedback.message(step.g, tracker, estimate);
    EXPECT_NEAR(x, v - h, 1e-14);
    const double c = step.share * x;
    h += c;
    feedback.sent(c, tracker, estimate);
    EXPECT_NEAR(tracker, v - h, 1e-14);
    EXPECT_NEAR(estimate, h, 1e-14);
  }
}

TEST(Feedback, EF21MWithEtaOneIsEF21) {
  const EF21M<double> momentum{1, 0};
  double tracker = 0, estimate = 0, h = 0, unused = 0;
  for (const Draw& step : some_steps()) {
    momentum.prepare(step.g, tracker, estimate);
    EF21().prepare(step.g, h, unused);
    const double x = EF21().message(step.g, h, unused);
    EXPECT_EQ(momentum.message(step.g, tracker, estimate), x);
    momentum.sent(step.share * x, tracker, estimate);
    EF21().sent(step.share * x, h, unused);
    EXPECT_EQ(estimate, h);
  }
}

template <class F>
void expect_undone(const F& feedback, double keep) {
  std::mt19937 random(2);
  std::normal_distribution<double> normal;
  for (int i = 0; i < 100; ++i) {
    const double g = normal(random), a = normal(random), b = normal(random);
    double a1 = a, b1 = b;
    feedback.prepare(g, a1, b1);
    const double x = std::abs(a1) + std::abs(g) + std::abs(b);
    feedback.undo(g, a1, b1);
    EXPECT_NEAR(a1, a, 4 * 2.3e-16 * x / keep);
    EXPECT_EQ(b1, b);
  }
}

TEST(Feedback, UndoTakesPrepareBack) {
  expect_undone(NoFeedback(), 1);
  expect_undone(EF14(), 1);
  expect_undone(EF21(), 1);
  expect_undone(EF21M<double>{0.1, 0.9}, 0.9);
  expect_undone(EF21M<double>{0.9, 0.1}, 0.1);
}

TEST(Feedback, CountsOfState) {
  EXPECT_EQ(own_states(FeedbackKind::kNone), 0);
  EXPECT_EQ(own_states(FeedbackKind::kEF14), 1);
  EXPECT_EQ(own_states(FeedbackKind::kEF21), 1);
  EXPECT_EQ(own_states(FeedbackKind::kEF21M), 2);
  EXPECT_FALSE(shares_estimate(FeedbackKind::kNone));
  EXPECT_FALSE(shares_estimate(FeedbackKind::kEF14));
  EXPECT_TRUE(shares_estimate(FeedbackKind::kEF21));
  EXPECT_TRUE(shares_estimate(FeedbackKind::kEF21M));
}

}  // namespace
}  // namespace arc_topk
