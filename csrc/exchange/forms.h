// In which form each bucket is averaged, where the link decides (Config::adaptive): arithmetic over
// measured times, the same on every rank.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace arc_topk {

enum class Form : uint8_t { kDense, kHalf, kCompressed };
constexpr std::size_t kNumForms = 3;
const char* name_of(Form form);

// Seconds of one bucket in one form.
struct FormTimes {
  double before = 0;  // of its own work on the thread that backward runs on
  double wire = 0;    // of its collectives
  double behind = 0;  // of its own work from then on
};

struct BucketTimes {
  double ready =
      0;  // behind the step's first bucket, less what the hook itself has taken before it
  std::array<FormTimes, kNumForms> forms;
};

// A form a bucket, and the seconds from the step's first bucket to its last result.
struct Choice {
  std::vector<Form> forms;
  double seconds = 0;
};

// One wire, on which buckets follow each other, each as soon as it is ready.
double seconds_of(const std::vector<BucketTimes>& times, const std::vector<Form>& forms);

// What there is to choose from, the gentlest to the gradient first: all dense, all in half the
// bytes, each bucket in the form that takes least, all compressed.
constexpr std::size_t kNumChoices = 4;
std::array<Choice, kNumChoices> choices_of(const std::vector<BucketTimes>& times);

// The gentlest that takes next to no longer than the fastest; `now`, if it is one of those.
std::size_t choose(const std::array<Choice, kNumChoices>& choices, const std::vector<Form>& now);

}  // namespace arc_topk
