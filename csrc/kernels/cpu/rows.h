// What is done to one piece of a bucket, on one thread: a table of functions, one table for each
// instruction set that rows.cpp is compiled for. All tables give the same bits. kernels.h says what
// each step means; kernels.cpp shares the pieces out between threads.
#pragma once

#include "kernels/kernels.h"

namespace arc_topk::cpu {

// What a piece of a dense tensor's mean holds.
struct Marks {
  bool nonzero;
  bool nonfinite;
};

enum class PackMode : uint8_t {
  kPayload,  // fill the payload; the state stays as it is (the outcome is not known yet)
  kCommit,   // the payload went out by kPayload: account for it in the state
  kBoth,     // both in one pass over the rows
};

struct Rows {
  const char* isa;

  void (*project)(float* data, int64_t stride, int64_t begin, int64_t end, int64_t sketch_dim,
                  uint64_t seed, uint64_t step);

  // --- compressed segments ---
  bool (*has_nonzero)(const Bucket&, const Piece&);
  // The state's update and, given v, the sketch. `store` false: the state stays as it is. Returns
  // whether every candidate was finite; what is not is never stored.
  bool (*prepare)(const Bucket&, const Piece&, const Projection* v, bool store);
  void (*undo)(const Bucket&, const Piece&);
  void (*reclaim)(const Bucket&, const Piece&);
  double (*score)(const Bucket&, const Piece&);
  void (*randomize)(const Bucket&, const Piece&, uint64_t seed, uint64_t step);
  void (*magnitudes)(const Bucket&, const Piece&);
  // select_largest().
  void (*select32)(const uint32_t* keys, uint32_t mask, int64_t count, int64_t kept,
                   uint32_t* spare, int64_t room, int32_t* picks);
  void (*select64)(const uint64_t* keys, uint64_t mask, int64_t count, int64_t kept,
                   uint64_t* spare, int64_t room, int32_t* picks);
  void (*pack)(const Bucket&, const Piece&, PackMode);
  double (*apply)(const Bucket&, const Piece&);
  double (*apply_gathered)(const Bucket&, const Piece&, const void* message, const void* gathered,
                           int64_t stride);

  // --- dense segments ---
  void (*copy_dense)(const Bucket&, const Piece&);
  // The mean of `copies` payloads that lie `stride` bytes apart, the first `shift` bytes behind the
  // bucket's own; copies = 0: the mean is what `gradient` holds.
  Marks (*mark_dense)(const Bucket&, const Piece&, int64_t shift, int64_t copies, int64_t stride);
  void (*apply_dense)(const Bucket&, const Piece&, int64_t shift, int64_t copies, int64_t stride);

  // --- any segment ---
  void (*publish)(const Bucket&, const Piece&);
  void (*remember)(const Bucket&, const Piece&);
  void (*adopt)(const Bucket&, const Piece&);   // h = gradient
  void (*divide)(const Bucket&, const Piece&);  // gradient /= N
};

// The tables that this machine can run, the best one last; and how many.
constexpr int kMaxTables = 3;
int tables(const Rows* (&found)[kMaxTables]);

}  // namespace arc_topk::cpu
