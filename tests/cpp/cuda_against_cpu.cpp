#include "cuda_against_cpu.h"

#include <bit>
#include <cstdio>

#include "cuda_on_host.h"
#include "plan/plan.h"

namespace arc_topk::testing {
namespace {

uint64_t bits(double x) { return std::isnan(x) ? 1 : std::bit_cast<uint64_t>(x); }

[[noreturn]] void differ(const char* when, const char* what, int64_t i, double cpu, double cuda) {
  char text[256];
  std::snprintf(text, sizeof(text), "%s: %s %lld is %.17g on the CPU, %.17g by CUDA's kernels",
                when, what, static_cast<long long>(i), cpu, cuda);
  throw Difference(text);
}

// To the bit, but for which NaN it is.
void expect_same(double cpu, double cuda, const char* when, const char* what, int64_t i) {
  if (bits(cpu) != bits(cuda)) differ(when, what, i, cpu, cuda);
}

void expect_close(double cpu, double cuda, double tolerance, const char* when, const char* what,
                  int64_t i) {
  const bool same = std::isfinite(cpu) ? std::abs(cpu - cuda) <= tolerance : !std::isfinite(cuda);
  if (!same) differ(when, what, i, cpu, cuda);
}

}  // namespace

CudaBucket::CudaBucket(const BucketSpec& spec) : CudaBucket(spec, CudaOnHost()) {}

CudaBucket::CudaBucket(const BucketSpec& spec, const Kernels& kernels) : BucketInMemory(spec) {
  pieces = cut_into_pieces(segments, kernels.grain());
  b.pieces = pieces.data();
  b.num_pieces = static_cast<int64_t>(pieces.size());
  b.splits_rows = splits_rows(pieces, segments);
  scratch_.resize(static_cast<size_t>(kernels.scratch_bytes(b)) / 8 + 1);
  b.scratch = scratch_.data();
}

double CudaBucket::estimate(int64_t i) const {
  for (int64_t k = 0; k < b.num_segments; ++k) {
    if (b.is_withheld[k] != 0 && segments[static_cast<size_t>(k)].offset == i)
      return get(b.state_type, b.withheld, k);
  }
  return shared(i);
}

Pair::Pair(const BucketSpec& spec, const Kernels& kernels)
    : kernels(kernels), host(spec, cpu_kernels()), cuda(spec) {
  host.projection();
  v = cuda.projection();
  host.v = cuda.v;
}

void Pair::expect_same_state(const char* when) const {
  for (int64_t i = 0; i < host.b.numel; ++i) {
    expect_same(host.own_a(i), cuda.own_a(i), when, "own_a", i);
    expect_same(host.own_b(i), cuda.own_b(i), when, "own_b", i);
    if (host.b.shared != nullptr) expect_same(host.shared(i), cuda.estimate(i), when, "h", i);
  }
}

void Pair::expect_same_marks(const char* when) const {
  const auto number = [](Outcome x) { return static_cast<double>(x); };
  for (int64_t i = 0; i < host.b.num_segments; ++i) {
    if (!host.segments[static_cast<size_t>(i)].compressed()) continue;
    expect_same(host.b.used[i], cuda.b.used[i], when, "used", i);
    expect_same(host.b.bad[i], cuda.b.bad[i], when, "bad", i);
    expect_same(number(host.b.outcome[i]), number(cuda.b.outcome[i]), when, "outcome", i);
  }
}

void Pair::expect_same_flags(const char* when) const {
  for (const Segment& s : host.segments) {
    if (!s.compressed()) continue;
    expect_same(get(host.b.flag_type, host.b.flags, s.flag),
                get(cuda.b.flag_type, cuda.b.flags, s.flag), when, "flag", s.flag);
  }
}

void Pair::expect_same_picks(const char* when) const {
  for (int64_t i = 0; i < host.b.num_segments; ++i) {
    const Segment& s = host.segments[static_cast<size_t>(i)];
    if (!s.compressed() || host.b.outcome[i] != Outcome::kNormal) continue;
    for (int64_t k = s.pick; k < s.pick + s.kept; ++k)
      expect_same(host.b.picks[k], cuda.b.picks[k], when, "pick", k);
  }
}

void Pair::expect_same_second(const char* when) const {
  for (int64_t i = 0; i < host.second_numel; ++i)
    expect_same(host.second(i), cuda.second(i), when, "second payload", i);
}

void Pair::expect_close_first(const char* when) const {
  for (const Segment& s : host.segments) {
    if (!s.compressed() && !s.dense_in_first) continue;
    const int64_t begin = s.compressed() ? s.sketch : s.packed;
    const int64_t end = begin + (s.compressed() ? s.rows * host.b.sketch_dim : s.numel);
    const double rounding = s.compressed() ? 2e-5 * std::sqrt(static_cast<double>(s.cols)) : 0;
    for (int64_t i = begin; i < end; ++i)
      expect_close(host.first(i), cuda.first(i), rounding, when, "first payload", i);
    const int64_t units = s.units(host.b.sketch_dim);
    for (int64_t i = units; s.compressed() && i < units + s.rows; ++i) {
      if (host.b.wire_type == DType::kU8)
        expect_close(host.first(i), cuda.first(i), 1e-6 * host.first(i), when, "unit", i);
    }
  }
}

void Pair::expect_close_energy(const char* when) const {
  const auto close = [when](double cpu, double cuda, const char* what) {
    expect_close(cpu, cuda, 1e-9 * (1 + cpu), when, what, 0);
  };
  close(host.energy.total, cuda.energy.total, "energy, total");
  close(host.energy.captured, cuda.energy.captured, "energy, captured");
}

void Pair::expect_same_result(const char* when) const {
  const bool shared = shares_estimate(host.b.feedback);
  const bool host_publishes = !shared || cpu_kernels().publish(host.b);
  const bool cuda_publishes = !shared || kernels.publish(cuda.b);
  for (int64_t k = 0; k < host.b.num_segments; ++k) {
    const Segment& s = host.segments[static_cast<size_t>(k)];
    const bool finite = host.b.outcome[k] != Outcome::kNonFinite;
    const int64_t count = finite || cuda_publishes ? s.numel : std::min<int64_t>(1, s.numel);
    for (int64_t i = s.offset; i < s.offset + count; ++i) {
      const double expected = host_publishes ? host.gradient(i) : host.shared(i);
      const double result = cuda_publishes ? cuda.gradient(i) : cuda.shared(i);
      expect_same(expected, result, when, "result", i);
    }
  }
}

void set_flags(const Bucket& b) {
  for (int64_t i = 1; i < b.num_segments; i += 2) {
    const Segment& s = b.segments[i];
    if (s.compressed()) set(b.flag_type, b.flags, s.flag, get(b.flag_type, b.flags, s.flag) + 1);
  }
}

namespace {
// What the sum over ranks makes of bytes, where all have sent the same. (Zeros are not sent as 0.)
void sum_bytes(const CudaBucket& x) {
  if (x.b.wire_type != DType::kU8) return;
  auto* bytes = static_cast<uint8_t*>(x.b.second);
  for (int64_t i = 0; i < x.second_numel; ++i)
    bytes[i] = static_cast<uint8_t>(bytes[i] * x.b.world_size);
}

void one_sketched_step(const BucketSpec& spec, const Kernels& kernels, Pair& x) {
  const Projection host_v = x.host_v();
  cpu_kernels().prepare(x.host.b, &host_v);
  kernels.prepare(x.cuda.b, &x.v);
  x.expect_same_marks("prepare");
  x.expect_same_state("prepare");
  x.expect_close_first("prepare");
  x.expect_same_flags("prepare");

  // One sketch for both from here on: sums in another order may tell rows apart differently.
  const int64_t bytes = x.host.first_numel * size_of(work_type(spec.gradient));
  if (bytes > 0) std::memcpy(x.cuda.b.first, x.host.b.first, static_cast<size_t>(bytes));
  set_flags(x.host.b);
  set_flags(x.cuda.b);
  x.both([](const Kernels& its, CudaBucket& bucket) { its.select(bucket.b, {Keys::kSketch}); });
  x.expect_same_marks("select");
  x.expect_same_picks("select");
  x.expect_close_energy("select");

  x.both([](const Kernels& its, CudaBucket& bucket) { its.pack_and_commit(bucket.b); });
  x.expect_same_state("pack");
  x.expect_same_second("pack");

  x.both([](const Kernels& its, CudaBucket& bucket) {
    sum_bytes(bucket);
    its.apply(bucket.b, nullptr);
  });
  x.expect_same_state("apply");
  x.expect_same_result("apply");
  x.expect_close_energy("apply");
}
}  // namespace

void sketched_steps(const BucketSpec& spec, const Kernels& kernels, const Change& change) {
  Pair x(spec, kernels);
  change(x.host);
  change(x.cuda);
  one_sketched_step(spec, kernels, x);
  x.host.refill(5);
  x.cuda.refill(5);
  if (spec.feedback == FeedbackKind::kEF14) {
    x.both([](const Kernels& its, CudaBucket& bucket) { its.reclaim(bucket.b); });
    x.expect_same_state("reclaim");
  }
  one_sketched_step(spec, kernels, x);
}

void random_step(BucketSpec spec, const Kernels& kernels, const Change& change) {
  spec.sketch_dim = 0;
  Pair x(spec, kernels);
  change(x.host);
  change(x.cuda);
  x.both([](const Kernels& its, CudaBucket& bucket) {
    its.prepare(bucket.b, nullptr);
    its.select(bucket.b, {Keys::kRandom, 0x123456789, 5});
    its.pack(bucket.b);
    set_flags(bucket.b);
    its.commit(bucket.b, nullptr);
    its.apply(bucket.b, nullptr);
  });
  x.expect_same_marks("step");
  x.expect_same_state("step");
  x.expect_same_second("step");
  x.expect_same_result("step");
}

}  // namespace arc_topk::testing
