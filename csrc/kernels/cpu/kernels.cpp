// The CPU's kernels: what is done to a piece is in rows.cpp, here the pieces are shared out between
// threads and the segments' marks are kept. at::parallel_for splits into equal contiguous parts.
#include "kernels/cpu/kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/low_rank.h"
#include "kernels/cpu/underflow.h"
#include "kernels/loss_scale.h"

namespace arc_topk {
namespace cpu {

namespace baseline {
extern const Rows rows;
extern const LowRankSteps low_rank_steps;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const Rows rows;
extern const LowRankSteps low_rank_steps;
}  // namespace avx2
namespace avx512 {
extern const Rows rows;
extern const LowRankSteps low_rank_steps;
}  // namespace avx512
#endif

int tables(const Rows* (&found)[kMaxTables]) {
  int count = 0;
  found[count++] = &baseline::rows;
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("fma")) found[count++] = &avx2::rows;
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found[count++] = &avx512::rows;
  }
#endif
  return count;
}

namespace {

// Calls f(piece, segment, index of the piece).
template <class F>
void for_pieces(const Bucket& b, const F& f) {
  at::parallel_for(0, b.num_pieces, 1, [&](int64_t begin, int64_t end) {
    const GradualUnderflow kept;
    for (int64_t i = begin; i < end; ++i) f(b.pieces[i], b.segments[b.pieces[i].segment], i);
  });
}

// Added up piece by piece in their order: the same sum whatever the number of threads.
template <class F>
double sum_over_pieces(const Bucket& b, const F& f) {
  static thread_local std::vector<double> sums;  // grows to the largest bucket's, once
  if (static_cast<int64_t>(sums.size()) < b.num_pieces)
    sums.resize(static_cast<size_t>(b.num_pieces));
  double* const part = sums.data();
  for_pieces(b, [&](const Piece& p, const Segment& s, int64_t i) { part[i] = f(p, s); });
  double sum = 0;
  for (int64_t i = 0; i < b.num_pieces; ++i) sum += part[i];
  return sum;
}

// Several threads may work on one segment. All of them write the same value.
void mark(uint8_t& flag) { std::atomic_ref(flag).store(1, std::memory_order_relaxed); }
bool is_marked(uint8_t& flag) { return std::atomic_ref(flag).load(std::memory_order_relaxed) != 0; }

// A flag's number as it travels; 0, 1 and infinity have simple bits in every type.
double read_flag(DType type, const void* flags, int64_t i) {
  const char* at = static_cast<const char*>(flags) + i * size_of(type);
  const auto read = [at](auto x) {
    std::memcpy(&x, at, sizeof(x));
    return x;
  };
  switch (type) {
    case DType::kF64:
      return read(double{});
    case DType::kF32:
      return read(float{});
    case DType::kBF16:
      return std::bit_cast<float>(uint32_t{read(uint16_t{})} << 16);
    case DType::kU8:  // two bytes: kernels/directions.h
      return at[1] != 0 ? std::numeric_limits<double>::infinity() : read(uint8_t{});
    case DType::kF16:
      break;
  }
  // Only zero and non-finite are told apart.
  const uint16_t bits = read(uint16_t{}) & 0x7FFF;
  return bits >= 0x7C00 ? std::numeric_limits<double>::infinity() : bits;
}

// Where the message lies as it is, in the work type; null: nowhere. A number's bits without its
// sign are then its key.
const void* message_of(const Bucket& b) {
  const DType work = work_type(b.gradient_type);
  if (b.feedback == FeedbackKind::kEF14) return b.state_type == work ? b.own_a : nullptr;
  const bool plain = b.feedback == FeedbackKind::kNone && b.loss_scale == nullptr;
  return plain && b.gradient_type == work ? b.gradient : nullptr;
}

int64_t distance(const void* from, const void* to) {
  return static_cast<const char*>(to) - static_cast<const char*>(from);
}

// What lies at `at` in this rank's message, in the first of the gathered ones.
const void* moved(const void* at, const Gathered& gathered) {
  return static_cast<const char*>(at) + distance(gathered.own, gathered.data);
}

void write_flag(DType type, void* flags, int64_t i, double value) {
  char* at = static_cast<char*>(flags) + i * size_of(type);
  const auto write = [at](auto x) { std::memcpy(at, &x, sizeof(x)); };
  const bool infinite = std::isinf(value);
  switch (type) {
    case DType::kF64:
      return write(value);
    case DType::kF32:
      return write(static_cast<float>(value));
    case DType::kBF16:
      return write(static_cast<uint16_t>(infinite ? 0x7F80 : value != 0 ? 0x3F80 : 0));
    case DType::kF16:
      return write(static_cast<uint16_t>(infinite ? 0x7C00 : value != 0 ? 0x3C00 : 0));
    case DType::kU8:
      at[0] = static_cast<char>(infinite || value == 0 ? 0 : 1);
      at[1] = static_cast<char>(infinite ? 1 : 0);
      return;
  }
}

}  // namespace

CpuKernels::CpuKernels(const Rows& rows, const LowRankSteps& steps)
    : rows_(rows), low_rank_(std::make_unique<CpuLowRank>(*this, rows, steps)) {}

CpuKernels::~CpuKernels() = default;

const LowRankKernels* CpuKernels::low_rank() const { return low_rank_.get(); }

// Long enough to hide the cost of handing a piece out, short enough that every thread gets some of
// every bucket and a piece's arrays stay in the L2 cache. A row is one thread's.
Grain CpuKernels::grain() const { return {32768, false, 2 * kWindowCols}; }

int64_t CpuKernels::scratch_bytes(const Bucket& b) const {
  if (b.factors.left_numel > 0) return b.factors.left_numel * size_of(DType::kF64);
  int64_t num_keys = 0;
  for (int64_t i = 0; i < b.num_segments; ++i) {
    if (b.segments[i].compressed()) num_keys = b.segments[i].key + b.segments[i].rows;
  }
  return num_keys * size_of(work_type(b.gradient_type));
}

void CpuKernels::project(const Bucket& b, float* data, int64_t stride, int64_t begin, int64_t end,
                         uint64_t seed, uint64_t step) const {
  constexpr int64_t kGrain = 4096;
  at::parallel_for(begin, end, kGrain, [&](int64_t from, int64_t to) {
    const GradualUnderflow kept;
    rows_.project(data, stride, from, to, b.sketch_dim, seed, step);
  });
}

void CpuKernels::reclaim(const Bucket& b) const {
  if (!was_skipped(b)) return;
  for_pieces(b, [&](const Piece& p, const Segment& s, int64_t) {
    if (s.compressed() && b.outcome[p.segment] == Outcome::kNormal) rows_.reclaim(b, p);
  });
}

void CpuKernels::prepare(const Bucket& b, const Projection* v) const {
  scan(b);
  update(b, v);
  write_flags(b);
}

void CpuKernels::select(const Bucket& b, const Keys& keys) const {
  switch (keys.kind) {
    case Keys::kSketch:
      read_flags(b, b.flags, 1, 0);
      b.energy->total += score(b);
      break;
    case Keys::kRandom:
      randomize(b, keys.seed, keys.step);
      break;
    case Keys::kMagnitude:
      if (const void* message = message_of(b)) return pick(b, message);
      magnitudes(b);
      break;
  }
  pick(b);
}

void CpuKernels::pack(const Bucket& b) const { pack(b, PackMode::kPayload); }

void CpuKernels::commit(const Bucket& b, const Gathered* gathered) const {
  if (gathered == nullptr) {
    read_flags(b, b.flags, 1, 0);
  } else {
    const void* flags = moved(b.flags, *gathered);
    read_flags(b, flags, b.world_size, gathered->stride);
  }
  settle(b);
  pack(b, PackMode::kCommit);
}

void CpuKernels::pack_and_commit(const Bucket& b) const {
  settle(b);
  pack(b, PackMode::kBoth);
}

void CpuKernels::apply(const Bucket& b, const Gathered* gathered) const {
  b.energy->captured += gathered == nullptr ? apply_reduced(b) : apply_gathered(b, *gathered);
}

void CpuKernels::scan(const Bucket& b) const {
  std::fill_n(b.used, b.num_segments, static_cast<uint8_t>(!b.may_be_unused));
  for_pieces(b, [&](const Piece& p, const Segment& s, int64_t) {
    uint8_t& used = b.used[p.segment];
    if (s.compressed() && !is_marked(used) && rows_.has_nonzero(b, p)) mark(used);
  });
}

void CpuKernels::update(const Bucket& b, const Projection* v) const {
  std::fill_n(b.bad, b.num_segments, uint8_t{0});
  std::fill_n(b.outcome, b.num_segments, Outcome::kNormal);
  for_pieces(b, [&](const Piece& p, const Segment& s, int64_t) {
    if (!s.compressed()) return rows_.copy_dense(b, p);
    if (!rows_.prepare(b, p, v, b.used[p.segment])) mark(b.bad[p.segment]);
  });
}

void CpuKernels::write_flags(const Bucket& b) const {
  for (int64_t i = 0; i < b.num_segments; ++i) {
    if (!b.segments[i].compressed()) continue;
    const double used = b.used[i] ? 1 : 0;
    write_flag(b.flag_type, b.flags, b.segments[i].flag,
               b.bad[i] ? std::numeric_limits<double>::infinity() : used);
  }
}

void CpuKernels::read_flags(const Bucket& b, const void* flags, int64_t copies,
                            int64_t stride) const {
  for (int64_t i = 0; i < b.num_segments; ++i) {
    if (!b.segments[i].compressed()) continue;
    double sum = 0;
    for (int64_t copy = 0; copy < copies; ++copy) {
      sum += read_flag(b.flag_type, static_cast<const char*>(flags) + copy * stride,
                       b.segments[i].flag);
    }
    b.outcome[i] = !std::isfinite(sum) ? Outcome::kNonFinite
                   : sum == 0          ? Outcome::kUnused
                                       : Outcome::kNormal;
  }
}

void CpuKernels::settle(const Bucket& b) const {
  for_pieces(b, [&](const Piece& p, const Segment& s, int64_t) {
    if (!s.compressed()) return;
    const bool stored = b.used[p.segment];
    const Outcome outcome = b.outcome[p.segment];
    if (!stored && outcome == Outcome::kNormal) rows_.prepare(b, p, nullptr, true);
    if (stored && outcome == Outcome::kNonFinite) rows_.undo(b, p);
  });
}

double CpuKernels::score(const Bucket& b) const {
  return sum_over_pieces(b, [&](const Piece& p, const Segment& s) {
    const bool scored = s.compressed() && b.outcome[p.segment] == Outcome::kNormal;
    return scored ? rows_.score(b, p) : 0;
  });
}

void CpuKernels::randomize(const Bucket& b, uint64_t seed, uint64_t step) const {
  for_pieces(b, [&](const Piece& p, const Segment& s, int64_t) {
    if (s.compressed()) rows_.randomize(b, p, seed, step);
  });
}

void CpuKernels::magnitudes(const Bucket& b) const {
  for_pieces(b, [&](const Piece& p, const Segment& s, int64_t) {
    if (s.compressed()) rows_.magnitudes(b, p);
  });
}

void CpuKernels::pick(const Bucket& b) const { pick(b, nullptr); }

void CpuKernels::pick(const Bucket& b, const void* message) const {
  const auto pick = [&](const Segment& s, auto select, auto bits) {
    using Key = decltype(bits);
    Key* const keys = static_cast<Key*>(b.scratch) + s.key;
    int32_t* const picks = b.picks + s.pick;
    if (message == nullptr) return select(keys, ~Key{0}, s.rows, s.kept, nullptr, 0, picks);
    const Key* const own = static_cast<const Key*>(message) + s.offset;
    select(own, ~Key{0} >> 1, s.rows, s.kept, keys, s.rows, picks);
  };
  at::parallel_for(0, b.num_segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Segment& s = b.segments[i];
      if (!s.compressed() || b.outcome[i] != Outcome::kNormal) continue;
      if (b.gradient_type == DType::kF64) {
        pick(s, rows_.select64, uint64_t{});
      } else {
        pick(s, rows_.select32, uint32_t{});
      }
    }
  });
}

void CpuKernels::pack(const Bucket& b, PackMode mode) const {
  for_pieces(b, [&](const Piece& p, const Segment& s, int64_t) {
    if (s.compressed()) rows_.pack(b, p, mode);
  });
}

double CpuKernels::apply_reduced(const Bucket& b) const {
  if (shares_estimate(b.feedback)) mark_dense(b, 0, 1, 0);
  return sum_over_pieces(b, [&](const Piece& p, const Segment& s) {
    if (s.compressed()) return rows_.apply(b, p);
    rows_.apply_dense(b, p, 0, 1, 0);
    return 0.0;
  });
}

double CpuKernels::apply_gathered(const Bucket& b, const Gathered& gathered) const {
  const int64_t shift = distance(gathered.own, gathered.data);
  if (shares_estimate(b.feedback)) mark_dense(b, shift, b.world_size, gathered.stride);
  return sum_over_pieces(b, [&](const Piece& p, const Segment& s) {
    if (s.compressed())
      return rows_.apply_gathered(b, p, gathered.own, gathered.data, gathered.stride);
    rows_.apply_dense(b, p, shift, b.world_size, gathered.stride);
    return 0.0;
  });
}

// The shared estimate lies in bucket order and is what DDP is to get: handing out its arena saves
// the pass that would copy it. Not where its type or scale differs from the bucket's, which DDP
// relies on, or where a tensor's result, NaN or zeros, is not its estimate.
bool CpuKernels::publish(const Bucket& b) const {
  const bool is_estimate = std::all_of(b.outcome, b.outcome + b.num_segments,
                                       [](Outcome o) { return o == Outcome::kNormal; });
  const bool is_result = b.state_type == b.gradient_type && b.loss_scale == nullptr;
  if (is_estimate && is_result && !b.result_in_gradient) return false;
  for_pieces(b, [&](const Piece& p, const Segment&, int64_t) { rows_.publish(b, p); });
  return true;
}

void CpuKernels::remember(const Bucket& b) const {
  for_pieces(b, [&](const Piece& p, const Segment&, int64_t) { rows_.remember(b, p); });
}

bool CpuKernels::adopt(const Bucket& b) const {
  uint8_t nonfinite = 0;
  for_pieces(b, [&](const Piece& p, const Segment&, int64_t) {
    if (!is_marked(nonfinite) && rows_.mark_dense(b, p, 0, 0, 0).nonfinite) mark(nonfinite);
  });
  if (nonfinite) return false;
  for_pieces(b, [&](const Piece& p, const Segment&, int64_t) { rows_.adopt(b, p); });
  return true;
}

void CpuKernels::divide(const Bucket& b) const {
  for_pieces(b, [&](const Piece& p, const Segment&, int64_t) { rows_.divide(b, p); });
}

void CpuKernels::blend(const Bucket& b) const {
  mark_dense(b, 0, 0, 0);
  for_pieces(b, [&](const Piece& p, const Segment&, int64_t) { rows_.apply_dense(b, p, 0, 0, 0); });
}

void CpuKernels::mark_dense(const Bucket& b, int64_t shift, int64_t copies, int64_t stride) const {
  for (int64_t i = 0; i < b.num_segments; ++i) {
    if (b.segments[i].compressed()) continue;
    b.used[i] = static_cast<uint8_t>(!b.may_be_unused);
    b.bad[i] = 0;
  }
  for_pieces(b, [&](const Piece& p, const Segment& s, int64_t) {
    if (s.compressed()) return;
    const Marks marks = rows_.mark_dense(b, p, shift, copies, stride);
    if (marks.nonzero) mark(b.used[p.segment]);
    if (marks.nonfinite) mark(b.bad[p.segment]);
  });
  for (int64_t i = 0; i < b.num_segments; ++i) {
    if (b.segments[i].compressed()) continue;
    b.outcome[i] = b.bad[i] ? Outcome::kNonFinite : b.used[i] ? Outcome::kNormal : Outcome::kUnused;
  }
}

const CpuKernels& kernels_with(const Rows& table) {
  static const CpuKernels baseline(baseline::rows, baseline::low_rank_steps);
#if defined(__x86_64__)
  static const CpuKernels avx2(avx2::rows, avx2::low_rank_steps);
  static const CpuKernels avx512(avx512::rows, avx512::low_rank_steps);
  if (&table == &avx2::rows) return avx2;
  if (&table == &avx512::rows) return avx512;
#endif
  return baseline;
}

namespace {

const Rows& best_table() {
  const Rows* found[kMaxTables];
  return *found[tables(found) - 1];
}

}  // namespace
}  // namespace cpu

const Kernels& cpu_kernels() {
  static const Kernels& kernels = cpu::kernels_with(cpu::best_table());
  return kernels;
}

const char* cpu_isa() {
  static const char* const isa = cpu::best_table().isa;
  return isa;
}

}  // namespace arc_topk
