// What an engine is ready for.
//
//   - running: buckets are admitted
//   - draining: the caller waits for what is in the air, because buckets are about to change
//   - failed: an exchange has failed; the process group is of no use, all later ones fail at once
//   - closed: stopped, in order to go on with another DDP instance, or for good
//
// CONTRIBUTING.md has the table of who may do what in which state.
#pragma once

#include <mutex>
#include <string>

namespace arc_topk {

class Lifecycle {
 public:
  enum class Condition { kRunning, kDraining, kFailed, kClosed };

  // Throws std::runtime_error, with the reason, unless it is running.
  void check_running() const;
  // Of the first exchange that failed; empty: none has.
  std::string failure() const;
  bool failed() const { return !failure().empty(); }

  // The first failure's text stays.
  void fail(const std::string& text);
  void close();
  void open();  // forgets failures: what follows goes over other groups

  // While it lives, the engine is draining.
  class Draining {
   public:
    explicit Draining(Lifecycle& lifecycle);
    ~Draining();
    Draining(const Draining&) = delete;
    Draining& operator=(const Draining&) = delete;

   private:
    Lifecycle& lifecycle_;
  };

 private:
  mutable std::mutex mutex_;
  Condition condition_ = Condition::kRunning;
  std::string failure_;
};

}  // namespace arc_topk
