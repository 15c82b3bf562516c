// Config::adaptive: measures what each form of averaging takes here, and has all ranks choose
// together, bucket by bucket, again and again.
//
// At first every form is tried for two steps. From then on only what is in use is measured, and the
// others are taken to have become slower or faster on the wire as that has, beyond the latency:
// what a link does to one payload it does to all. (A bandwidth fitted to sketches and rows, which
// travel at the same time, would be a guess at a dense bucket a hundred times as large.) The
// latency is what the agreement itself takes. A form that would be nearly as fast as the one in use
// is tried again for a step, so that guesses do not grow old.
//
// A step's first bucket tells it that the step begins, and carries the agreement along where one is
// due; what comes of it counts from the next step on.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "exchange/forms.h"

namespace arc_topk {

class Adaptive {
 public:
  // `collectives`: of a compressed bucket.
  explicit Adaptive(int collectives) : collectives_(collectives) {}

  // What a step does with a bucket.
  struct Task {
    Form form = Form::kDense;
    bool measured = false;  // over a lane, where it is timed, whatever the form
    // Not empty: its first number is to become the seconds that an all-reduce of next to nothing
    // takes; then the least of all ranks' goes to agree().
    std::vector<double> exchange;
  };

  // --- the thread that backward runs on ---
  // A bucket's step begins. `step` is the same for all buckets of a step and on all ranks.
  Task begin(size_t index, uint64_t step, double now);
  // `seconds` of the hook's own work in it, before its collectives.
  void spent(double seconds) { late_ += seconds; }
  // A bucket that was not there before: all is measured anew, from `step` on.
  void forget(uint64_t step);
  // Nothing known counts any more, another link or other ranks.
  void restart();

  // --- any thread ---
  // What a bucket's step has taken, before its result is given out.
  // `bytes`: handed over, as an all-reduce's; the same on all ranks.
  void observe(size_t index, Form form, const FormTimes& times, double bytes);
  void agree(const std::vector<double>& least);

  // For people: the choice of each bucket, and why.
  struct Report {
    uint64_t step = 0;  // number of the step that it was made in, from 1; 0: there is none yet
    std::vector<Form> forms;
    std::array<double, kNumChoices> seconds{};  // Choice::seconds
  };
  Report report() const;

 private:
  std::optional<Form> trial(uint64_t phase) const;
  std::vector<double> to_exchange() const;
  void choose_trial(const std::vector<double>& least,
                    const std::array<Choice, kNumChoices>& choices, const Choice& used);
  double latency_of(size_t form, double latency) const;
  double growing(size_t bucket, size_t form, double latency) const;

  const int collectives_;
  std::optional<uint64_t> base_;  // the step that it began with
  double step_began_ = 0, late_ = 0;
  uint64_t phase_ = 0;               // steps since base_
  bool agrees_ = false;              // in this step, which is of no window
  std::vector<BucketTimes> window_;  // measured since the last agreement, infinite where not

  mutable std::mutex mutex_;        // of what follows: lanes agree, and people ask
  std::vector<BucketTimes> known_;  // of all ranks
  std::vector<std::array<double, kNumForms>> bytes_;  // of a bucket in each form
  double latency_ = 0;
  std::vector<Form> chosen_;
  std::vector<Form> next_;  // chosen in this step, for those behind it
  std::optional<Form> to_try_;
  std::array<double, kNumForms> unseen_{};  // agreements since a form was measured
  std::optional<uint64_t> agreeing_;        // the step whose agreement is on its way
  Report report_;
};

}  // namespace arc_topk
