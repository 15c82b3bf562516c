#include "exchange/forms.h"

#include <algorithm>

namespace arc_topk {
namespace {

constexpr double kNoise = 0.015;  // of the fastest's seconds

const FormTimes& times_of(const BucketTimes& bucket, Form form) {
  return bucket.forms[static_cast<size_t>(form)];
}

Form fastest(const BucketTimes& bucket) {
  Form best = Form::kDense;
  const auto sum = [&](Form form) {
    const FormTimes& t = times_of(bucket, form);
    return t.before + t.wire + t.behind;
  };
  for (const Form form : {Form::kHalf, Form::kCompressed}) {
    if (sum(form) < sum(best)) best = form;
  }
  return best;
}

}  // namespace

const char* name_of(Form form) {
  switch (form) {
    case Form::kDense:
      return "dense";
    case Form::kHalf:
      return "bfloat16";
    case Form::kCompressed:
      return "compressed";
  }
  return "?";
}

double seconds_of(const std::vector<BucketTimes>& times, const std::vector<Form>& forms) {
  double late = 0;  // of backward, by the hook's own work
  double wire = 0;  // free from then on
  double end = 0;
  for (size_t i = 0; i < times.size(); ++i) {
    const FormTimes& t = times_of(times[i], forms[i]);
    late += t.before;
    wire = std::max(wire, times[i].ready + late) + t.wire;
    end = std::max(end, wire + t.behind);
  }
  return end;
}

std::array<Choice, kNumChoices> choices_of(const std::vector<BucketTimes>& times) {
  std::vector<Form> each;
  for (const BucketTimes& bucket : times) each.push_back(fastest(bucket));
  const auto all = [&](Form form) { return std::vector<Form>(times.size(), form); };
  std::array<Choice, kNumChoices> choices{
      {{all(Form::kDense)}, {all(Form::kHalf)}, {std::move(each)}, {all(Form::kCompressed)}}};
  for (Choice& choice : choices) choice.seconds = seconds_of(times, choice.forms);
  return choices;
}

std::size_t choose(const std::array<Choice, kNumChoices>& choices, const std::vector<Form>& now) {
  double least = choices[0].seconds;
  for (const Choice& choice : choices) least = std::min(least, choice.seconds);
  const double enough = (1 + kNoise) * least;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (choices[i].forms == now && choices[i].seconds <= enough) return i;
  }
  size_t first = 0;
  while (choices[first].seconds > enough) ++first;
  return first;
}

}  // namespace arc_topk
