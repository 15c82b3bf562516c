// Top-K: each rank keeps its own K elements of largest magnitude. The ranks' choices differ, so
// values and int32 indices are all-gathered, and C is the mean of N sparse contributions. The
// classical baseline.
//
//   message, bytes:  [values if 8 bytes] | dense tensors (work type) | indices | flags | values
//
// The order keeps every part aligned without padding: padding would make the bytes of a tensor
// depend on the bucket it is in.
#include <algorithm>

#include "compress/compressor.h"

namespace arc_topk {
namespace {

constexpr int64_t kIndexBytes = 4;
constexpr int64_t kFlagBytes = 4;

class TopK final : public Compressor {
 public:
  const char* name() const override { return "top_k"; }
  bool by_element() const override { return true; }
  bool gathers() const override { return true; }

  int64_t wire_bytes(const Matrix& x, const Types& types, const Config&) const override {
    return x.kept * (size_of(types.wire) + kIndexBytes) + kFlagBytes;
  }

  // A ring all-gather sends N - 1 times what a rank hands over, a ring all-reduce 2 (N - 1) / N
  // times.
  double link_cost(int world_size) const override { return std::max(world_size, 2) / 2.0; }

  void lay_out(Plan& plan, const Config&) const override {
    for (Segment& s : plan.segments) {
      if (!s.compressed()) {
        plan.append_dense(s);
        continue;
      }
      s.packed = plan.second_numel;
      plan.second_numel += s.kept;
    }
  }

  void prepare(Step& step) const override {
    const Bucket& bucket = step.bucket();
    const Kernels& kernels = step.kernels();
    step.enter(Phase::kPrepare);
    kernels.prepare(bucket, nullptr);
    step.enter(Phase::kSelect);
    kernels.select(bucket, {Keys::kMagnitude});
    step.enter(Phase::kPack);
    kernels.pack(bucket);
  }

  void first(Step& step) const override { step.all_gather_message(Phase::kFirstCollective); }

  void last(Step& step) const override {
    const Bucket& bucket = step.bucket();
    const Kernels& kernels = step.kernels();
    const Gathered gathered = step.gathered();

    step.enter(Phase::kPack);
    kernels.commit(bucket, &gathered);

    step.enter(Phase::kApply);
    kernels.apply(bucket, &gathered);
  }
};

}  // namespace

const Compressor& top_k() {
  static const TopK compressor;
  return compressor;
}

}  // namespace arc_topk
