#include "exchange/lanes.h"

#include <algorithm>

namespace arc_topk {

void Lanes::start() {
  for (CommThread* lane : all()) lane->start();
}

// A lane that is idle hands on nothing more.
bool Lanes::drain(std::optional<std::chrono::milliseconds> at_most) {
  if (CommThread* here = current()) return here->drain(at_most);  // which says what is wrong
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  for (CommThread* lane : all()) {
    std::optional<std::chrono::milliseconds> left = at_most;
    if (left) {
      *left -= std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - begin);
      *left = std::max(*left, std::chrono::milliseconds(0));
    }
    if (!lane->drain(left)) return false;
  }
  return true;
}

void Lanes::stop() {
  for (CommThread* lane : all()) lane->stop();
}

CommThread* Lanes::current() {
  for (CommThread* lane : all()) {
    if (lane->is_current()) return lane;
  }
  return nullptr;
}

}  // namespace arc_topk
