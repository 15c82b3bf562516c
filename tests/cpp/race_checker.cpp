#include "race_checker.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>
#include <stdexcept>
#include <unordered_map>

namespace arc_topk::testing::race {
namespace {

constexpr size_t kMemory = size_t{1} << 24;  // of the device, at most
constexpr size_t kShared = size_t{1} << 18;
constexpr size_t kMargin = 256;
constexpr size_t kMostReports = 20;

// Threads by their number, and:
constexpr uint16_t kNobody = 0xFFFF;
constexpr uint16_t kAll = 0xFFFE;      // what is done outside of a phase, all threads do
constexpr uint16_t kSeveral = 0xFFFD;  // threads have touched a byte in one epoch

enum Kind : uint8_t { kPlain, kAdd, kMark, kFresh };
enum State : uint8_t { kForbidden, kNeverWritten, kWritten };

// Who touched a byte. Epochs are numbered through all blocks of all launches, from 1.
struct Touch {
  uint32_t epoch = 0;
  uint16_t thread = kNobody;
  Kind kind = kPlain;
};
struct Cell {
  Touch write;
  Touch read;
  State state = kForbidden;
};

// What comes before a fence: a block's epochs before this one, and of this one a thread's part.
struct Limit {
  uint32_t epoch = 0;
  uint16_t thread = kNobody;
};
struct Release {
  size_t block;
  Limit limit;
};

// Memory and what is known of its bytes.
struct Region {
  const unsigned char* base = nullptr;
  size_t size = 0;
  std::vector<Cell> cells;

  Cell* find(const void* at, size_t bytes) {
    const auto offset =
        reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(base);  // wraps below it
    if (offset >= size) return nullptr;
    if (offset + bytes > size) throw std::logic_error("an access beyond the end of all memory");
    return cells.data() + offset;
  }
};

struct Named {
  std::string name;
  size_t offset;
  size_t bytes;
};

class Checker {
 public:
  Checker() : storage_(kMemory) {
    memory_.base = storage_.data();
    shared_.cells.resize(kShared);
  }

  // --- tests -------------------------------------------------------------------------------------

  void reset() {
    memory_.size = 0;
    memory_.cells.clear();
    named_.clear();
    reports.clear();
    sites.clear();
    counts = {};
    running_ = false;
    seen_.clear();
    skipped.reset();
    stops = false;
  }
  void* allocate(const std::string& name, size_t bytes) {
    const size_t begin = (memory_.size + kMargin + kMargin - 1) / kMargin * kMargin;
    memory_.size = begin + bytes + kMargin;
    if (memory_.size > kMemory) throw std::logic_error("raise kMemory");
    memory_.cells.resize(memory_.size);
    named_.push_back({name, begin, bytes});
    unsigned char* at = storage_.data() + begin;
    std::memset(at, 0, bytes);
    set_written(at, bytes, false);
    return at;
  }
  void set_written(const void* at, size_t bytes, bool written) {
    Cell* cells = memory_.find(at, bytes);
    if (cells == nullptr) throw std::logic_error("not the device's memory");
    for (size_t i = 0; i < bytes; ++i) cells[i].state = written ? kWritten : kNeverWritten;
  }
  void expect_written(const void* at, size_t bytes) {
    Cell* cells = memory_.find(at, bytes);
    for (size_t i = 0; i < bytes; ++i) {
      if (cells[i].state != kWritten)
        return report("is sent, but nobody has written", cells + i, nullptr);
    }
  }

  // --- accesses ----------------------------------------------------------------------------------

  void access(const void* at, size_t bytes, bool reads, bool writes, Kind kind) {
    if (!running_) return;
    Cell* cells = memory_.find(at, bytes);
    if (cells == nullptr) cells = shared_.find(at, bytes);
    if (cells == nullptr) return;  // a thread's own
    ++counts.accesses;
    for (Cell* cell = cells; cell != cells + bytes; ++cell) {
      if (cell->state != kWritten) {
        if (cell->state == kForbidden) report("may not be touched", cell, nullptr);
        if (reads && cell->state == kNeverWritten) report("is read, never written", cell, nullptr);
        cell->state = kWritten;
      }
      check(cell, writes, kind);
      note(writes ? cell->write : cell->read, kind);
    }
  }

  // --- order -------------------------------------------------------------------------------------

  void launch(const char* name) {
    kernel_ = name;
    ++counts.launches;
    launch_begin_ = now_ + 1;
    begins_.clear();
    clocks_.clear();
  }
  void end_block() { running_ = false; }
  void block(const void* shared, size_t bytes) {
    if (bytes > kShared) throw std::logic_error("raise kShared");
    running_ = true;
    ++counts.blocks;
    ++now_;
    ++counts.phases;
    begins_.push_back(now_);
    shared_.base = static_cast<const unsigned char*>(shared);
    shared_.size = bytes;
    Cell fresh;
    fresh.state = kNeverWritten;
    std::fill_n(shared_.cells.begin(), bytes, fresh);
    acquired_.assign(begins_.size(), Limit{});
    acquiring_.clear();
    observed_.clear();
    fenced_ = {};
    thread = kAll;
  }
  void sync() {
    if (stops && !reports.empty()) throw Stopped();
    ++now_;
    ++counts.phases;
    for (const Release& release : acquiring_) acquire(release);
    acquiring_.clear();
  }
  // Whether it is to be left out.
  bool skips(const std::source_location& at) {
    const Site site = site_of(at);
    ++sites[site];
    return skipped == site;
  }
  void fence() {
    fenced_ = {now_, thread};
    for (const Observed& seen : observed_) {
      const std::vector<Release>& clock = clocks_[seen.counter];
      acquiring_.insert(acquiring_.end(), clock.begin(),
                        clock.begin() + static_cast<ptrdiff_t>(seen.releases));
    }
    acquirer_ = thread;
    observed_.clear();
  }
  // Atomic addition to a counter: what was fenced off before it is released, what others have
  // released by it is theirs who come later.
  void count(const void* counter) {
    const bool releases = fenced_.epoch != 0 && (fenced_.epoch < now_ || fenced_.thread == thread);
    const auto clock = clocks_.find(counter);
    if (clock != clocks_.end()) observed_.push_back({counter, clock->second.size()});
    if (!releases) return;
    std::vector<Release>& its = clocks_[counter];
    its.push_back({begins_.size() - 1, fenced_});
    for (size_t i = 0; i + 1 < acquired_.size(); ++i) {
      if (acquired_[i].epoch != 0) its.push_back({i, acquired_[i]});
    }
  }

  uint16_t thread = kAll;
  std::optional<Site> skipped;
  bool stops = false;
  std::vector<std::string> reports;
  std::map<Site, uint64_t> sites;
  Counts counts;

 private:
  struct Observed {
    const void* counter;
    size_t releases;
  };

  void check(Cell* cell, bool writes, Kind kind) {
    if (writes && thread == kAll) report("is written by all threads", cell, nullptr);
    if (clash(cell->write, kind)) report(writes ? "is written" : "is read", cell, &cell->write);
    if (writes && clash(cell->read, kind)) report("is written", cell, &cell->read);
  }
  bool clash(const Touch& earlier, Kind kind) {
    return earlier.epoch >= launch_begin_ && !may_meet(earlier.kind, kind) && !ordered(earlier);
  }
  static bool may_meet(Kind a, Kind b) {
    if (a == kPlain || b == kPlain) return false;
    // A sum that is read before it is complete.
    return !(a == kAdd && b == kFresh) && !(a == kFresh && b == kAdd);
  }
  bool ordered(const Touch& earlier) const {
    const auto within = [&](Limit limit) {
      return earlier.epoch < limit.epoch ||
             (earlier.epoch == limit.epoch && earlier.thread == limit.thread &&
              limit.thread != kAll);
    };
    if (earlier.epoch >= begins_.back()) return within({now_, thread});
    const auto next = std::upper_bound(begins_.begin(), begins_.end(), earlier.epoch);
    const auto block = static_cast<size_t>(next - begins_.begin()) - 1;
    if (within(acquired_[block])) return true;
    // A thread's own fence is for the others only from the next barrier on.
    return thread == acquirer_ &&
           std::any_of(acquiring_.begin(), acquiring_.end(), [&](const Release& release) {
             return release.block == block && within(release.limit);
           });
  }
  void note(Touch& touch, Kind kind) const {
    if (touch.epoch == now_) {
      if (touch.thread != thread) touch.thread = kSeveral;
      if (kind == kPlain) touch.kind = kPlain;
      return;
    }
    touch = {now_, thread, kind};
  }
  void acquire(const Release& release) {
    Limit& limit = acquired_[release.block];
    if (limit.epoch < release.limit.epoch) limit = release.limit;
  }

  static std::string name_of(uint16_t thread) {
    return thread == kAll       ? "all threads"
           : thread == kSeveral ? "several threads"
                                : "thread " + std::to_string(thread);
  }
  std::string place_of(const Cell* cell) const {
    const std::ptrdiff_t in_shared = cell - shared_.cells.data();
    if (in_shared >= 0 && in_shared < static_cast<std::ptrdiff_t>(kShared))
      return "byte " + std::to_string(in_shared) + " of shared memory";
    const auto offset = static_cast<size_t>(cell - memory_.cells.data());
    std::string place = "a byte of no array";
    for (const Named& array : named_) {
      if (offset + kMargin >= array.offset && offset < array.offset + array.bytes + kMargin)
        place = "byte " +
                std::to_string(static_cast<int64_t>(offset) - static_cast<int64_t>(array.offset)) +
                " of " + array.name + " (" + std::to_string(array.bytes) + ")";
    }
    return place;
  }
  // One report for each kind of fault, kernel and pair of phases would still be many: one for each
  // kernel and text is kept.
  void report(const char* what, const Cell* cell, const Touch* earlier) {
    std::string text = std::string(kernel_) + ": " + place_of(cell) + " " + what;
    if (running_) text += " by " + name_of(thread);
    if (earlier != nullptr) {
      const bool same_block = earlier->epoch >= begins_.back();
      text += std::string(", ") + (earlier == &cell->write ? "written" : "read") + " by " +
              name_of(earlier->thread) + (same_block ? " of the same block" : " of another block") +
              " with nothing between";
    }
    if (reports.size() < kMostReports && seen_.insert(kernel_ + std::string(what)).second)
      reports.push_back(text);
  }

  std::vector<unsigned char> storage_;
  Region memory_;
  Region shared_;
  std::vector<Named> named_;

  const char* kernel_ = "";
  bool running_ = false;
  uint32_t now_ = 0;
  uint32_t launch_begin_ = 1;
  std::vector<uint32_t> begins_;  // the first epoch of each block of this launch

  // Of the running block, of what others have done: what comes before all that it does, and what
  // comes before what its thread `acquirer_` does until the next barrier.
  std::vector<Limit> acquired_;
  std::vector<Release> acquiring_;
  uint16_t acquirer_ = kNobody;
  std::vector<Observed> observed_;  // since its last fence
  Limit fenced_;
  std::unordered_map<const void*, std::vector<Release>> clocks_;  // of counters
  std::set<std::string> seen_;
};

Checker& checker() {
  static Checker only;
  return only;
}

}  // namespace

Site site_of(const std::source_location& at) {
  const std::string file = at.file_name();
  return {file.substr(file.rfind('/') + 1), at.line()};
}

void reset() { checker().reset(); }
void* allocate(const std::string& name, size_t bytes) { return checker().allocate(name, bytes); }
void set_written(const void* at, size_t bytes, bool written) {
  if (bytes > 0) checker().set_written(at, bytes, written);
}
void expect_written(const void* at, size_t bytes) {
  if (bytes > 0) checker().expect_written(at, bytes);
}
void skip(const Site& site) { checker().skipped = site; }
void stop_at_first(bool stops) { checker().stops = stops; }
const std::vector<std::string>& reports() { return checker().reports; }
const Counts& counts() { return checker().counts; }
const std::map<Site, uint64_t>& sites() { return checker().sites; }

void read(const void* at, size_t bytes) { checker().access(at, bytes, true, false, kPlain); }
void write(const void* at, size_t bytes) { checker().access(at, bytes, false, true, kPlain); }

void Watch::launch(const char* name) { checker().launch(name); }
void Watch::block(const void* shared, size_t bytes) { checker().block(shared, bytes); }
void Watch::end_block() { checker().end_block(); }
void Watch::thread(int t) { checker().thread = static_cast<uint16_t>(t); }
void Watch::all_threads() { checker().thread = kAll; }
void Watch::sync() { checker().sync(); }
void Watch::sync(const std::source_location& at) {
  if (!checker().skips(at)) checker().sync();
}
void Watch::fence(const std::source_location& at) {
  if (!checker().skips(at)) checker().fence();
}
uint32_t Watch::add(uint32_t* at, uint32_t x) {
  checker().access(at, sizeof(*at), true, true, kAdd);
  checker().count(at);
  const uint32_t old = *at;
  *at = old + x;
  return old;
}
double Watch::add(double* at, double x) {
  checker().access(at, sizeof(*at), true, true, kAdd);
  const double old = *at;
  *at = old + x;
  return old;
}
void Watch::store_mark(void* at, const void* from, size_t bytes) {
  checker().access(at, bytes, false, true, kMark);
  std::memmove(at, from, bytes);
}
void Watch::load_fresh(const void* at, void* to, size_t bytes) {
  checker().access(at, bytes, true, false, kFresh);
  std::memmove(to, at, bytes);  // which is not watched, as memcpy() is
}

}  // namespace arc_topk::testing::race
