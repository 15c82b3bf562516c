#include "exchange/adaptive.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace arc_topk {
namespace {

constexpr double kUnmeasured = std::numeric_limits<double>::infinity();
// The first steps: two of each form, and one for the ranks to agree in.
constexpr uint64_t kTrialsOfEach = 2;
constexpr uint64_t kFirst = kTrialsOfEach * kNumForms + 1;
// Then: so many steps from one agreement to the next, the last of which carries it; before it two
// that are measured, and before these one of another form.
constexpr uint64_t kEvery = 24;
// Trying another form may take half a hundredth of the time: one that is predicted to take x times
// as long as what is in use waits for 8 (x - 1) agreements.
constexpr double kLongerAnAgreement = 1.0 / 8;
constexpr size_t kNumbers = 1 + 3 * kNumForms;  // of a bucket, in the exchange
constexpr size_t kHead = 1;                     // before them: the latency

double number(const std::vector<double>& numbers, size_t bucket, size_t which) {
  return numbers[kHead + bucket * kNumbers + which];
}

// What a collective takes beyond its latency; something, for its bytes take some time.
double beyond(double wire, double latency) { return std::max(wire - latency, wire / 50); }

bool measured(double seconds) { return seconds != kUnmeasured; }

BucketTimes nothing() {
  BucketTimes times;
  times.ready = kUnmeasured;
  times.forms.fill({kUnmeasured, kUnmeasured, kUnmeasured});
  return times;
}

}  // namespace

// --- steps
// ----------------------------------------------------------------------------------------

std::optional<Form> Adaptive::trial(uint64_t phase) const {
  if (phase < kFirst) {
    return static_cast<Form>(std::min<uint64_t>(phase / kTrialsOfEach, kNumForms - 1));
  }
  if ((phase - kFirst) % kEvery == kEvery - 4) return to_try_;
  return std::nullopt;
}

Adaptive::Task Adaptive::begin(size_t index, uint64_t step, double now) {
  const std::lock_guard lock(mutex_);
  if (!base_) base_ = step;
  if (index == 0) {
    step_began_ = now;
    late_ = 0;
    if (!next_.empty()) chosen_ = std::exchange(next_, {});
  }
  phase_ = step - *base_;
  if (window_.size() <= index) window_.resize(index + 1, nothing());
  window_[index].ready = std::min(window_[index].ready, now - step_began_ - late_);

  const uint64_t behind = phase_ < kFirst ? 0 : (phase_ - kFirst) % kEvery;
  const bool must_agree = phase_ + 1 == kFirst || (phase_ >= kFirst && behind == kEvery - 1);
  const std::optional<Form> tried = trial(phase_);
  Task task;
  task.measured = phase_ < kFirst || behind + 4 >= kEvery;
  task.form = tried ? *tried : index < chosen_.size() ? chosen_[index] : Form::kDense;
  agrees_ = must_agree;
  if (index == 0 && must_agree) {
    task.exchange = to_exchange();
    agreeing_ = step;
    std::fill(window_.begin(), window_.end(), nothing());
  }
  return task;
}

void Adaptive::observe(size_t index, Form form, const FormTimes& times, double bytes) {
  const std::lock_guard lock(mutex_);
  if (agrees_ || index >= window_.size()) return;
  bytes_.resize(window_.size());
  bytes_[index][static_cast<size_t>(form)] = bytes;
  FormTimes& least = window_[index].forms[static_cast<size_t>(form)];
  least.before = std::min(least.before, times.before);
  least.wire = std::min(least.wire, times.wire);
  least.behind = std::min(least.behind, times.behind);
}

void Adaptive::forget(uint64_t step) {
  if (base_ == step) return;
  restart();
  base_ = step;
}

void Adaptive::restart() {
  const std::lock_guard lock(mutex_);
  base_.reset();
  phase_ = 0;
  window_.clear();
  known_.clear();
  bytes_.clear();
  latency_ = 0;
  chosen_.clear();
  next_.clear();
  to_try_.reset();
  unseen_.fill(0);
  agreeing_.reset();
  report_ = {};
}

// --- agreement
// ------------------------------------------------------------------------------------

// Ranks wait for the last of them in a collective: the least is what it takes itself. Of all else
// the slowest rank's counts, which is the least of the negative.
std::vector<double> Adaptive::to_exchange() const {
  std::vector<double> numbers{0};
  for (const BucketTimes& bucket : window_) {
    numbers.push_back(-bucket.ready);
    for (const FormTimes& form : bucket.forms) {
      numbers.insert(numbers.end(), {-form.before, form.wire, -form.behind});
    }
  }
  return numbers;
}

double Adaptive::latency_of(size_t form, double latency) const {
  return form == static_cast<size_t>(Form::kCompressed) ? collectives_ * latency : latency;
}

// Of what is known of a bucket's seconds on the wire, those that grow with its bytes, at the dense
// form's rate: it tells that best. The rest is none of the link's.
double Adaptive::growing(size_t bucket, size_t form, double latency) const {
  const std::array<double, kNumForms>& bytes = bytes_[bucket];
  const double share = form > 0 && bytes[0] > 0 ? bytes[form] / bytes[0] : 1;
  return share * beyond(known_[bucket].forms[0].wire, latency);
}

void Adaptive::agree(const std::vector<double>& least) {
  const std::lock_guard lock(mutex_);
  if (!agreeing_) return;  // forgotten meanwhile
  const size_t buckets = (least.size() - kHead) / kNumbers;
  known_.resize(buckets, nothing());
  bytes_.resize(buckets);
  const double latency = std::exchange(latency_, least[0]);  // when what is known was measured

  // How much slower the wire has become: what is measured again, against what it was before.
  double now = 0, before = 0;
  for (size_t i = 0; i < buckets; ++i) {
    for (size_t form = 0; form < kNumForms; ++form) {
      const double wire = number(least, i, 2 + 3 * form);
      const double was = known_[i].forms[form].wire;
      if (!measured(wire) || !measured(was)) continue;
      now += beyond(wire, latency_of(form, latency_));
      before += beyond(was, latency_of(form, latency));
    }
  }
  const double slower = before > 0 ? now / before : 1;

  for (size_t i = 0; i < buckets; ++i) {
    known_[i].ready = -number(least, i, 0);
    std::array<double, kNumForms> grows{};
    for (size_t form = 0; form < kNumForms; ++form) grows[form] = growing(i, form, latency);
    for (size_t form = 0; form < kNumForms; ++form) {
      FormTimes& known = known_[i].forms[form];
      const double wire = number(least, i, 2 + 3 * form);
      if (measured(wire)) {
        known = {-number(least, i, 1 + 3 * form), wire, -number(least, i, 3 + 3 * form)};
      } else if (measured(known.wire)) {
        const double later = latency_of(form, latency_) - latency_of(form, latency);
        known.wire = std::max(known.wire - grows[form] + later, 0.0) + slower * grows[form];
      }
    }
  }

  std::array<Choice, kNumChoices> choices = choices_of(known_);
  const size_t best = choose(choices, chosen_);
  choose_trial(least, choices, choices[best]);
  report_ = {*agreeing_ + 1, choices[best].forms, {}};
  for (size_t i = 0; i < kNumChoices; ++i) report_.seconds[i] = choices[i].seconds;
  // Read by begin() from the next step on: this one's buckets may be half-way through theirs.
  next_ = std::move(choices[best].forms);
  agreeing_.reset();
}

// What is known of a form that is not in use grows old, or was measured in a bad moment.
void Adaptive::choose_trial(const std::vector<double>& least,
                            const std::array<Choice, kNumChoices>& choices, const Choice& used) {
  to_try_.reset();
  double most = 0;
  for (size_t form = 0; form < kNumForms; ++form) {
    bool seen = true;
    for (size_t i = 0; i < used.forms.size(); ++i) {
      seen = seen && measured(number(least, i, 2 + 3 * form));
    }
    unseen_[form] = seen ? 0 : unseen_[form] + 1;
    // The choices of one form for all: the last is the third form's.
    const Choice& all = choices[form + 1 < kNumForms ? form : kNumChoices - 1];
    const double longer = all.seconds / used.seconds - 1;
    if (all.forms == used.forms || longer > kLongerAnAgreement * unseen_[form]) continue;
    if (unseen_[form] > most) to_try_ = static_cast<Form>(form);
    most = std::max(most, unseen_[form]);
  }
}

Adaptive::Report Adaptive::report() const {
  const std::lock_guard lock(mutex_);
  return report_;
}

}  // namespace arc_topk
