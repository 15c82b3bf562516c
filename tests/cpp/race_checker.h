// Finds races, and reads of what nobody has written, in kernels' bodies that run on the host.
//
// The bodies are compiled with -fsanitize=thread and linked without its runtime: for each access to
// memory the compiler calls a function of ours (race_hooks.cpp) that looks it up here. Of each byte
// of the device's memory it is known whether it may be touched, whether it was written, and who has
// last read and written it. Two accesses of which one writes must be in an order:
//
//   within a phase     only if one thread makes both
//   within a block     if a barrier lies between: each begins a new epoch
//   between blocks     if the first came before a fence, behind that the same thread added to a
//                      counter, and the second's block added to it later and then had a fence
//   between launches   always
//
// The host runs thread after thread and block after block, each in one order of many: what is found
// is not that something went wrong, but that nothing keeps it from doing so.
//
// Atomic additions may meet one another, and so may marks (a value that all who store it at once
// agree on) with marks, additions and fresh reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <source_location>
#include <string>
#include <vector>

namespace arc_topk::testing::race {

// A barrier or fence in the kernels' text.
struct Site {
  std::string file;
  uint32_t line;
  std::string text() const { return file + ":" + std::to_string(line); }
  auto operator<=>(const Site&) const = default;
};
Site site_of(const std::source_location& at);

struct Counts {
  uint64_t accesses = 0;  // to the device's memory
  uint64_t phases = 0;    // from barrier to barrier
  uint64_t blocks = 0;
  uint64_t launches = 0;
};

// Thrown at the first barrier after a report, where stop_at_first() asked for it.
struct Stopped {};

// --- for tests -----------------------------------------------------------------------------------

// Forgets all that was told before: memory, reports, sites, what to leave out.
void reset();
// Memory of the device, zero; behind and before it is some that nobody may touch.
void* allocate(const std::string& name, size_t bytes);
void set_written(const void* at, size_t bytes, bool written = true);
// Reports bytes that nobody has written: before they are sent, say.
void expect_written(const void* at, size_t bytes);

// Leaves out a barrier or fence.
void skip(const Site& site);
void stop_at_first(bool stops);

const std::vector<std::string>& reports();
const Counts& counts();
// Those come to since reset(), and how often.
const std::map<Site, uint64_t>& sites();

// --- for race_hooks.cpp --------------------------------------------------------------------------

void read(const void* at, size_t bytes);
void write(const void* at, size_t bytes);

// --- for HostBlock: see Unwatched ----------------------------------------------------------------

struct Watch {
  static void launch(const char* name);
  static void block(const void* shared, size_t bytes);
  static void end_block();
  static void thread(int t);
  static void all_threads();
  static void sync();
  static void sync(const std::source_location& at);
  static void fence(const std::source_location& at);
  static uint32_t add(uint32_t* at, uint32_t x);
  static double add(double* at, double x);
  template <class T>
  static void mark(T* at, T x) {
    store_mark(at, &x, sizeof(T));
  }
  template <class T>
  static T fresh(const T* at) {
    T x;
    load_fresh(at, &x, sizeof(T));
    return x;
  }

 private:
  static void store_mark(void* at, const void* from, size_t bytes);
  static void load_fresh(const void* at, void* to, size_t bytes);
};

}  // namespace arc_topk::testing::race
