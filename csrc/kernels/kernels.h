// The one seam between the algorithm and a device: plain structs, raw pointers, one virtual call
// for a whole bucket. The algorithm (csrc/compress, csrc/exchange) knows nothing of SIMD or CUDA; a
// device knows nothing of collectives, DDP or tensors. A new device is one new folder beside cpu/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/types.h"
#include "feedback/feedback.h"

namespace arc_topk {

// What values are multiplied with before those of all ranks are summed: the sum may overflow though
// their mean does not, in float16 at 65504, in float32 at 3e38. A power of two, since that loses
// nothing but the smallest subnormal numbers, and what is lost stays in the error feedback.
constexpr double scale_of_sum(int world_size) {
  double scale = 1;
  while (scale * world_size > 1) scale /= 2;
  return scale;
}

// More rows than one block of a device should select from alone.
constexpr int64_t kManyRows = 1 << 16;

// One tensor of a bucket, seen as a matrix of `rows` x `cols` elements lying one after the other.
// Made once with the plan. Offsets count elements of the array they point into.
struct Segment {
  int64_t offset;   // first element in the bucket, and in every state arena
  int64_t numel;    // less than rows * cols where the last row is short, and zero beyond its end
  int64_t rows;     // m
  int64_t cols;     // n
  int64_t kept;     // K, low rank: k; 0 for a tensor that stays dense (rows = numel, cols = 1)
  int64_t flag;     // compressed: its place among the flags (of bytes: two of them)
  int64_t sketch;   // compressed: its m x r sketch in the first payload (row-major); low rank: P
  int64_t packed;   // its K x n rows, R^T, or its dense copy, in the payload that carries them
  int64_t key;      // compressed: its m rows among those of all compressed segments
  int64_t pick;     // compressed: its K selected rows
  int64_t large;    // compressed, of more than kManyRows rows: its place among such
  uint32_t stream;  // tells the tensors of one bucket apart in random numbers
  bool dense_in_first;  // dense: rides in the first payload (work type), not the second

  constexpr bool compressed() const { return kept > 0; }
  // Compressed, on an uint8 wire: units of rows behind the sketch; of R's columns behind P.
  constexpr int64_t units(int64_t columns) const { return sketch + rows * columns; }
  constexpr bool has_many_rows() const { return compressed() && rows > kManyRows; }
};

// A part of one segment: the unit in which work is shared out between threads or blocks. About
// equal numbers of elements each, whatever the shapes. Whole rows, unless the device splits long
// ones: then columns [col_begin, col_end) of a single row. Small, for a device keeps thousands.
struct Piece {
  uint32_t segment;
  uint32_t row_begin;
  uint32_t row_end;
  uint32_t col_begin;
  uint32_t col_end;
};
constexpr int64_t kMostRows = 0xFFFFFFFF;  // and columns that a piece can name

// How a device wants its pieces.
struct Grain {
  int64_t numel;      // elements of a piece, about
  bool splits_rows;   // rows of more than that go into several pieces
  int64_t tile_cols;  // columns of a tile
};

// What became of a compressed tensor in this step, the same on all ranks (read off the summed
// flags).
enum class Outcome : uint8_t {
  kNormal,
  kUnused,     // may_be_unused, and its gradient was zero on every rank: no state changes, and the
               // result is zero
  kNonFinite,  // a NaN or infinity on some rank: the result is NaN, the state is as before the step
};

// Low rank: where the factors of a segment lie.
struct FactorPlace {
  int64_t left;     // its P^, m x k, among those of all
  int64_t right;    // its k columns of n elements, factor_stride(n) apart
  int64_t partial;  // as many for each strip of rows, or m k for each window of columns
  int64_t bytes;    // on an uint8 wire: in Bucket::directions
};

// Low rank: what lies between steps, or only within one, beside payloads and state. The residual is
// own_a - P^ R_i^T at any moment; see kernels/low_rank.h.
struct Factors {
  void* left;     // work type: P^ of each matrix
  void* right;    // work type: R_i as sent; zero where own_a is the residual itself
  float* basis;   // W; columns of zeros are drawn when next needed
  void* partial;  // work type: X_i W by windows of columns, where a device wants them so;
                  // X_i^T P^ by strips of rows; then, in the first, R
  const FactorPlace* places;  // a segment each
  const Piece* tiles;         // see cut_into_tiles()
  int64_t num_tiles;
  int64_t left_numel;    // of all matrices
  int64_t most_columns;  // k of the matrix that has the most
};

// The distance between the columns of a factor, in elements. They are read side by side: a distance
// of a power of two would put the same rows of all of them in the same few cache sets.
constexpr int64_t factor_stride(int64_t cols) {
  const int64_t whole = (cols + 15) / 16 * 16;
  return whole % 256 == 0 ? whole + 16 : whole;
}
// X_i^T P^ is summed over so many rows at a time, and these sums one after the other: the same
// numbers whatever the number of threads.
constexpr int64_t kStripRows = 512;
// So is X_i W over so many columns.
constexpr int64_t kWindowCols = 512;

// Everything a kernel is told about a bucket. Buffers have the plan's sizes; unused ones are null.
struct Bucket {
  const Segment* segments;
  int64_t num_segments;
  int64_t num_dense;  // segments that stay dense
  int64_t num_large;  // segments of more than kManyRows rows
  const Piece* pieces;
  int64_t num_pieces;
  bool splits_rows;         // some piece is a part of a row
  bool may_be_unused;       // a gradient that is zero on every rank stands for none at all
  bool result_in_gradient;  // publish() always writes the result into `gradient`
  int64_t numel;

  DType gradient_type;
  DType state_type;
  DType wire_type;
  FeedbackKind feedback;
  double eta;
  int64_t sketch_dim;  // r; 0 for a compressor that makes no sketch

  void* gradient;  // gradient_type: the bucket itself; also where the result goes when h is not it
  void* own_a;     // state_type: see feedback.h
  void* own_b;
  void* shared;  // state_type: h

  // Payloads. Top-K's lie inside one message of bytes, picks and flags with them.
  void* first;   // work type: flags | sketches, units | dense tensors
  void* second;  // wire_type: (Rand-K: flags |) rows | dense tensors
  // Low rank on an uint8 wire: what travels in place of `first`, which is this rank's alone then.
  // kernels/directions.h says what is in it.
  uint8_t* directions;
  void* flags;  // one number per compressed segment, inside one of the payloads; of bytes, two
  DType flag_type;
  int32_t* picks;  // selected rows, ascending within a segment
  Factors factors;

  // Where a step's sums go: see Energy. Kernels add to it.
  struct Energy* energy;
  // CUDA: the cudaStream_t that launches go to. Null on the CPU, which has worked when it returns.
  void* stream;

  // Scratch, of the device's memory like everything but the table of numbers here.
  uint8_t* used;  // a segment each: this rank's gradient counts, it has a non-zero element or may
                  // not be unused
  uint8_t* bad;   // a segment each: this rank's message has a non-finite element
  Outcome* outcome;  // a segment each
  void* scratch;     // Kernels::scratch_bytes(), zero before the first step

  // Where the host cannot know the outcome, a segment each: see Kernels::publish().
  void* withheld;        // state_type: the first element of h, while NaN stands in its place
  uint8_t* is_withheld;  // whether it does

  int rank;  // of this step
  int world_size;
  // Wire values are X_i * wire_scale: scale_of_sum(), or 1 where they are not summed on their way.
  // What comes back is divided by it again. (Rows on an uint8 wire are integers, and need none.)
  double wire_scale;

  // A GradScaler's scale in this step, which the loss was multiplied with, and behind it 1 over
  // that (no device has to divide), in the memory that the bucket lies in. Null: no scaler. The
  // gradient is read divided by it, and what becomes the result is multiplied with it: state,
  // sketches and picked rows know nothing of it. Dense tensors travel as they are.
  const double* loss_scale;
  const double* scale_before;  // the same in the bucket's step before
};

// V^T: sketch_dim rows of `stride` floats each (n of them valid): column c of V is contiguous. They
// begin at multiples of 64 bytes.
struct Projection {
  const float* data;
  int64_t stride;
};

struct Energy {
  double captured;  // sum of squares of the averaged rows, ||C||^2
  double total;     // sum of all scores, an unbiased estimate of ||mean X||^2
};

// What rows are selected by.
struct Keys {
  enum Kind : uint8_t {
    kSketch,     // ||P_j||^2, P the summed sketch divided by N. Bit-identical on every machine:
                 // columns in order, no fused multiply-add.
    kRandom,     // uniform 32-bit integers from (seed, step, segment's stream, row)
    kMagnitude,  // |X_i|, for segments of one column
  } kind;
  uint64_t seed = 0;
  uint64_t step = 0;
};

// The messages of all ranks after an all-gather, `stride` bytes apart from `data`. `own` is where
// this rank's lies, for the places of flags, picks, values and dense tensors within a message.
struct Gathered {
  const void* own;
  const void* data;
  int64_t stride;
};

// A device's kernels. All are queued on Bucket::stream where a device has streams: none waits,
// but for adopt().
class Kernels {
 public:
  virtual ~Kernels() = default;

  // --- plan -------------------------------------------------------------------------------------
  virtual Grain grain() const = 0;
  // Those of low rank; null where the device has none.
  virtual const class LowRankKernels* low_rank() const { return nullptr; }
  // Bytes of Bucket::scratch, from the numbers of the bucket (segments and pieces in host memory).
  virtual int64_t scratch_bytes(const Bucket& b) const = 0;

  // Names what follows, up to end_range(), for the device's own profiler.
  virtual void begin_range(const char* /*name*/) const {}
  virtual void end_range() const {}

  // Why a device of this kind cannot run the kernels, and what to do about it; empty if it can.
  virtual std::string why_unusable(int /*index*/) const { return {}; }
  // Whether what is queued on a stream is written down, to be done again and again.
  virtual bool capturing(void* /*stream*/) const { return false; }

  // V for one step by random.h: columns c in [0, sketch_dim), rows [begin, end), at data[c * stride
  // + row]. A device may go on up to a multiple of 4 rows, within `stride`.
  virtual void project(const Bucket& b, float* data, int64_t stride, int64_t begin, int64_t end,
                       uint64_t seed, uint64_t step) const = 0;

  // --- before the first collective --------------------------------------------------------------
  // EF14 under a scaler, before prepare(): where the scaler has skipped the bucket's step before,
  // what was sent in it, and has changed nothing, goes back into the residual: the mean of all
  // ranks' rows, or this rank's own where they were gathered. picks[], outcome[] and both
  // payloads are still as that step has left them.
  virtual void reclaim(const Bucket& b) const = 0;
  // One pass over gradient and state: updates the state (feedback.prepare), sets used[], bad[] and
  // this rank's flags (0 unused, 1 used, infinity non-finite), sets outcome[] to normal and, given
  // a projection, adds up the sketches into `first`, for an uint8 wire this rank's shares of the
  // rows' units too. A non-finite state is never stored. The state
  // of a segment that is not used[] here stays, though it is sketched as if prepared: whether some
  // other rank has used it is not known yet. Dense segments are copied into their payload.
  virtual void prepare(const Bucket& b, const Projection* v) const = 0;

  // picks[] = the K rows of largest key of each segment, ties to the smaller row, ascending. Those
  // of a segment whose outcome is not normal are left as they are. By kSketch only after the
  // first payload was summed: outcome[] is then read off the flags, and energy->total += the
  // scores of normal segments.
  virtual void select(const Bucket& b, const Keys& keys) const = 0;

  // The picked rows of X_i, rounded to the wire type, into `second`. (An uint8 wire: in the units
  // that `first` has, summed.) A segment that is bad[] here sends zeros. The state stays as it is:
  // the outcome is not known yet.
  virtual void pack(const Bucket& b) const = 0;
  // Reads outcome[] off the flags (summed here over the messages if `gathered`) and brings own
  // state to what it demands: prepares what prepare() held back where some other rank has used the
  // tensor, takes back what it stored where some rank's gradient was non-finite, accounts for what
  // pack() has sent where all is normal.
  virtual void commit(const Bucket& b, const Gathered* gathered) const = 0;
  // After select() by kSketch: pack() and commit() in one pass over the rows. Segments that are
  // not normal send zeros.
  virtual void pack_and_commit(const Bucket& b) const = 0;

  // --- after the last collective ----------------------------------------------------------------
  // The summed payloads, or the mean of the messages, into the result. Feedback with a shared
  // estimate: h += C, dense segments h = mean (EF21M: (1 - eta) h + eta mean; unchanged where it
  // is unused). Others: C into `gradient`, zero outside the picked rows. A compressed segment that
  // is non-finite fills `gradient` with NaN (no shared estimate) or leaves h alone; a dense one
  // whose mean is non-finite gets outcome kNonFinite and leaves h alone too. energy->captured +=
  // ||C||^2 over normal compressed segments.
  virtual void apply(const Bucket& b, const Gathered* gathered) const = 0;
  // Only feedback with a shared estimate, after apply() or blend(): whether the result is to be
  // taken from `gradient`, as it was put there (h, NaN where the outcome is non-finite, zeros where
  // it is unused), rather than from h as it lies. Handing out h saves the pass that would copy it.
  // A device whose host does not know the outcome cannot where a tensor may be unused. Else it
  // tells of a non-finite one by NaN in the first element of h, keeps that element in withheld[]
  // and puts it back at the beginning of the bucket's next step; whoever else reads h has to look
  // there.
  virtual bool publish(const Bucket& b) const = 0;

  // --- steps whose mean gradient is dense: `gradient` is averaged in place ----------------------
  // `gradient` /= N, to the bit as DDP does it: times 1 / N. Before its all-reduce.
  virtual void divide(const Bucket& b) const = 0;
  // EF21, EF21M before the first compressed step's all-reduce: h_i = g_i, v_i - h_i = 0.
  virtual void remember(const Bucket& b) const = 0;
  // After it: h = mean. Returns false, and leaves h alone, where an element is non-finite: the one
  // place where the host waits for a device, once.
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
