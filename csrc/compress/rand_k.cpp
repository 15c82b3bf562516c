// Rand-K: K rows drawn uniformly without replacement from a seed that all ranks share, so that one
// index-free all-reduce suffices. Single elements with row_width = 1.
//
//   payload, wire type:  flags | K x n rows | dense tensors
//
// The draw: every row gets a uniform key, the K largest are kept. It shares the selection with
// ARC-Top-K, needs no order among rows, and any device can make any row's key by itself.
#include <algorithm>

#include "compress/compressor.h"

namespace arc_topk {
namespace {

class RandK final : public Compressor {
 public:
  const char* name() const override { return "rand_k"; }

  int64_t wire_bytes(const Matrix& x, const Types& types, const Config&) const override {
    return size_of(types.wire) * (x.kept * x.cols + 1);
  }

  // There is one payload, so what is dense rides in the wire's type, rounded if that is narrower.
  DType dense_type(const Types& types) const override { return types.wire; }

  void lay_out(Plan& plan, const Config&) const override {
    plan.flags_in_first = false;
    plan.flags_at = 0;
    plan.second_numel = plan.num_flags;
    for (Segment& s : plan.segments) {
      s.packed = plan.second_numel;
      plan.second_numel += s.compressed() ? s.kept * s.cols : s.numel;
    }
  }

  void prepare(Step& step) const override {
    const Bucket& bucket = step.bucket();
    const Kernels& kernels = step.kernels();
    step.enter(Phase::kPrepare);
    kernels.prepare(bucket, nullptr);
    step.enter(Phase::kSelect);
    kernels.select(bucket, {Keys::kRandom, step.seed(), step.number()});
    step.enter(Phase::kPack);
    kernels.pack(bucket);
  }

  void first(Step& step) const override { step.all_reduce_second(Phase::kFirstCollective); }

  void last(Step& step) const override {
    const Bucket& bucket = step.bucket();
    const Kernels& kernels = step.kernels();
    // The flags arrive with the rows: only now is it known that they may be taken as sent.
    step.enter(Phase::kPack);
    kernels.commit(bucket, nullptr);

    step.enter(Phase::kApply);
    kernels.apply(bucket, nullptr);
  }
};

}  // namespace

const Compressor& rand_k() {
  static const RandK compressor;
  return compressor;
}

}  // namespace arc_topk
