// The communication thread: jobs run in the order of submission, on one thread, none is lost.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "exchange/comm_thread.h"

namespace arc_topk {
namespace {

class Note final : public CommThread::Job {
 public:
  Note(std::vector<int>& order, int number) : order_(order), number_(number) {}
  void run() noexcept override {
    std::this_thread::sleep_for(std::chrono::microseconds(number_ % 3 * 50));
    order_.push_back(number_);
    thread = std::this_thread::get_id();
    ++runs;
  }
  void give_up() noexcept override { ++given_up; }
  std::thread::id thread;
  std::atomic<int> runs{0};
  std::atomic<int> given_up{0};

 private:
  std::vector<int>& order_;
  const int number_;
};

TEST(CommThread, RunsInOrderOnOneThread) {
  std::vector<int> order;
  std::vector<std::unique_ptr<Note>> notes;
  for (int i = 0; i < 200; ++i) notes.push_back(std::make_unique<Note>(order, i));
  {
    CommThread thread;
    thread.start();
    for (const auto& note : notes) thread.submit(*note);
    EXPECT_TRUE(thread.drain());
  }
  ASSERT_EQ(order.size(), 200U);
  for (int i = 0; i < 200; ++i) {
    EXPECT_EQ(order[i], i);
    EXPECT_EQ(notes[i]->thread, notes[0]->thread);
  }
  EXPECT_NE(notes[0]->thread, std::this_thread::get_id());
}

TEST(CommThread, AJobCanBeSubmittedAgainOnceItHasRun) {
  std::vector<int> order;
  Note note(order, 1);
  CommThread thread;
  for (int i = 1; i <= 50; ++i) {
    thread.start();
    thread.submit(note);
    while (note.runs.load() < i) std::this_thread::yield();
  }
  EXPECT_EQ(note.runs.load(), 50);
}

TEST(CommThread, AnUnusedOneHasNoThread) { const CommThread thread; }

}  // namespace
}  // namespace arc_topk
