// The one seam between the algorithm and a device: plain structs, raw pointers, one virtual call
// for a whole bucket. The algorithm (csrc/compress, csrc/exchange) knows nothing of SIMD or CUDA; a
// device knows nothing of collectives, DDP or tensors. A new device is one new folder beside cpu/.
#pragma once

#include <cstddef>
#include <cstdint>

#include "feedback/feedback.h"

namespace arc_topk {

enum class DType : uint8_t { kF32, kF64, kBF16, kF16 };

constexpr int64_t size_of(DType type) {
  return type == DType::kF64 ? 8 : type == DType::kF32 ? 4 : 2;
}

// The type sums, sketches and scores are made in.
constexpr DType work_type(DType gradient) {
  return gradient == DType::kF64 ? DType::kF64 : DType::kF32;
}

// One tensor of a bucket, seen as a matrix of `rows` x `cols` elements lying one after the other.
// Made once with the plan. Offsets count elements of the array they point into.
struct Segment {
  int64_t offset;   // first element in the bucket, and in every state arena
  int64_t numel;    // less than rows * cols where the last row is short, and zero beyond its end
  int64_t rows;     // m
  int64_t cols;     // n
  int64_t kept;     // K; 0 for a tensor that stays dense (it then has rows = numel, cols = 1)
  int64_t flag;     // compressed: its place among the flags
  int64_t sketch;   // compressed: its m x r sketch in the first payload (row-major)
  int64_t packed;   // its K x n rows, or its dense copy, in the payload that carries them
  int64_t key;      // compressed: its m scores
  int64_t pick;     // compressed: its K selected rows
  uint32_t stream;  // tells the tensors of one bucket apart in Rand-K's random numbers
  bool dense_in_first;  // dense: rides in the first payload (work type), not the second

  bool compressed() const { return kept > 0; }
};

// A run of rows of one segment: the unit in which work is shared out between threads or blocks.
// About equal numbers of elements each, whatever the shapes.
struct Piece {
  int64_t segment;
  int64_t row_begin;
  int64_t row_end;
};

// What became of a compressed tensor in this step, the same on all ranks (read off the summed
// flags).
enum class Outcome : uint8_t {
  kNormal,
  kUnused,     // its gradient was zero on every rank: no state changes
  kNonFinite,  // a NaN or infinity on some rank: the result is NaN, the state is as before the step
};

// Everything a kernel is told about a bucket. Buffers have the plan's sizes; unused ones are null.
struct Bucket {
  const Segment* segments;
  int64_t num_segments;
  const Piece* pieces;
  int64_t num_pieces;
  int64_t numel;

  DType gradient_type;
  DType state_type;
  DType wire_type;
  FeedbackKind feedback;
  double eta;
  int64_t sketch_dim;  // r

  void* gradient;  // gradient_type: the bucket itself; also where the result goes when h is not it
  void* own_a;     // state_type: see feedback.h
  void* own_b;
  void* shared;  // state_type: h

  // Payloads. Top-K's lie inside one message of bytes, picks and flags with them.
  void* first;   // work type: flags | sketches | dense tensors
  void* second;  // wire_type: (Rand-K: flags |) rows | dense tensors
  void* flags;   // one number per compressed segment, inside one of the payloads
  DType flag_type;
  int32_t* picks;  // selected rows, ascending within a segment

  // Scratch.
  uint8_t* used;     // a segment each: this rank's gradient has a non-zero element
  uint8_t* bad;      // a segment each: this rank's message has a non-finite element
  Outcome* outcome;  // a segment each
  void* keys;        // uint32 (uint64 for double): scores as unsigned integers of the same order

  int world_size;
  // Wire values are X_i * wire_scale: 1, or for fp16 a power of two that keeps the sum of all ranks
  // from overflowing. What comes back is divided by it again.
  double wire_scale;
};

// V^T: sketch_dim rows of `stride` floats each (n of them valid): column c of V is contiguous.
struct Projection {
  const float* data;
  int64_t stride;
};

enum class PackMode : uint8_t {
  kPayload,  // fill the payload; the state stays as it is (the outcome is not known yet)
  kCommit,   // the payload went out by kPayload: account for it in the state
  kBoth,     // both in one pass over the rows
};

struct Energy {
  double captured;  // sum of squares of the averaged rows, ||C||^2
  double total;     // sum of all scores, an unbiased estimate of ||mean X||^2
};

class Kernels {
 public:
  virtual ~Kernels() = default;

  // V for one step by random.h: columns c in [0, sketch_dim), rows [begin, end), at data[c * stride
  // + row].
  virtual void project(float* data, int64_t stride, int64_t begin, int64_t end, int64_t sketch_dim,
                       uint64_t seed, uint64_t step) const = 0;

  // --- before the first collective -------------------------------------------------------------
  // used[] of compressed segments. Stops reading a segment at its first non-zero element, so it
  // costs nothing for a tensor that has a gradient.
  virtual void scan(const Bucket& b) const = 0;

  // One pass over gradient and state: updates the state (feedback.prepare), sets bad[], and, given
  // a projection, adds up the sketches into `first`. A non-finite state is never stored. A segment
  // that is not used[] here is sketched as if prepared but its state stays: settle() decides. Dense
  // segments are copied into their payload.
  virtual void prepare(const Bucket& b, const Projection* v) const = 0;

  // This rank's flags: 0 unused, 1 used, infinity non-finite.
  virtual void write_flags(const Bucket& b) const = 0;

  // --- between collectives ---------------------------------------------------------------------
  // outcome[] from the flags, summed here over `copies` that lie `stride` bytes apart (1 after an
  // all-reduce, world_size after an all-gather). `flags` need not be b.flags.
  virtual void read_flags(const Bucket& b, const void* flags, int64_t copies,
                          int64_t stride) const = 0;

  // Brings own state to what the outcome demands: prepares what prepare() held back where some
  // other rank used the tensor; takes back what it stored where some rank's gradient was
  // non-finite.
  virtual void settle(const Bucket& b) const = 0;

  // keys[] = ||P_j||^2 with P the summed sketch divided by N; returns the scores' sum over normal
  // segments. Bit-identical on every machine: columns in order, no fused multiply-add.
  virtual double score(const Bucket& b) const = 0;
  // keys[] uniform 32-bit integers from (seed, step, segment's stream, row).
  virtual void randomize(const Bucket& b, uint64_t seed, uint64_t step) const = 0;
  // keys[] = |X_i|, for segments of one column.
  virtual void magnitudes(const Bucket& b) const = 0;
  // picks[] = the K rows of largest key of each normal segment, ties to the smaller row, ascending.
  virtual void select(const Bucket& b) const = 0;

  // The picked rows of X_i into `second`, rounded to the wire type, and that into the state: see
  // PackMode. A segment that is bad[] here or whose outcome is not normal sends zeros and keeps its
  // state. In kPayload mode a segment that is not used[] sends what prepare() would have formed.
  virtual void pack(const Bucket& b, PackMode mode) const = 0;

  // --- after the last collective ---------------------------------------------------------------
  // The summed payloads into the result. Feedback with a shared estimate: h += C, dense segments
  // h = mean (EF21M: (1 - eta) h + eta mean; unchanged where the mean is zero everywhere). Others:
  // C into `gradient`, zero outside the picked rows. A compressed segment that is non-finite fills
  // `gradient` with NaN (no shared estimate) or leaves h alone; a dense one whose mean is
  // non-finite gets outcome kNonFinite and leaves h alone too. Returns ||C||^2 over normal
  // compressed segments.
  virtual double apply(const Bucket& b) const = 0;

  // Top-K's apply(): the mean of world_size messages that lie `stride` bytes apart from `gathered`.
  // `message` is where this rank's own lies, for the places of first, second and picks within it.
  virtual double apply_gathered(const Bucket& b, const void* message, const void* gathered,
                                int64_t stride) const = 0;

  // `gradient` = h for feedback with a shared estimate, NaN where the outcome is non-finite.
  virtual void publish(const Bucket& b) const = 0;

  // --- steps whose mean gradient is dense: `gradient` is averaged in place
  // ------------------------ `gradient` /= N, to the bit as DDP does it: times 1 / N. Before its
  // all-reduce.
  virtual void divide(const Bucket& b) const = 0;
  // EF21, EF21M before the first compressed step's all-reduce: h_i = g_i, v_i - h_i = 0.
  virtual void remember(const Bucket& b) const = 0;
  // After it: h = mean. Returns false, and leaves h alone, where an element is non-finite.
  virtual bool adopt(const Bucket& b) const = 0;
  // A bucket of dense tensors under EF21M: h = (1 - eta) h + eta mean, per segment as in apply().
  virtual void blend(const Bucket& b) const = 0;
};

// The CPU's: SIMD chosen at run time, threads by at::parallel_for of the calling thread.
const Kernels& cpu_kernels();
// What it chose: "baseline", "avx2" or "avx512".
const char* cpu_isa();

// CUDA's, or null in a build without it.
const Kernels* cuda_kernels();

}  // namespace arc_topk
