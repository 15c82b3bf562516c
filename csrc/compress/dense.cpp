// Dense: C_i = X_i, C = the mean. Also what carries a bucket in which nothing is worth compressing.
//
// One all-reduce of the bucket's own buffer, in place: no payload, no copy, what DDP itself would
// do. Only a dense type that is not the gradient's (a float32 wire for bf16 gradients) needs a
// payload.
#include "compress/compressor.h"

namespace arc_topk {
namespace {

class Dense final : public Compressor {
 public:
  const char* name() const override { return "dense"; }
  bool compresses() const override { return false; }
  int64_t wire_bytes(const Matrix& matrix, const Types&, const Config&) const override {
    return matrix.dense_bytes;
  }

  void lay_out(Plan& plan, const Config&) const override {
    if (plan.in_place) return;
    const bool first = plan.types.dense_in_first();
    for (Segment& s : plan.segments) {
      s.dense_in_first = first;
      s.packed = s.offset;
    }
    (first ? plan.first_numel : plan.second_numel) = plan.numel;
  }

  void prepare(Step& step) const override {
    step.enter(Phase::kPrepare);
    if (!step.plan().in_place) step.kernels().prepare(step.bucket(), nullptr);
  }

  void first(Step& step) const override {
    const Plan& plan = step.plan();
    if (plan.in_place) {
      step.average_gradient(Phase::kFirstCollective);
    } else if (plan.first_numel > 0) {
      step.all_reduce_first(Phase::kFirstCollective);
    } else {
      step.all_reduce_second(Phase::kFirstCollective);
    }
  }

  void last(Step& step) const override {
    const Plan& plan = step.plan();
    step.enter(Phase::kApply);
    if (!plan.in_place) {
      step.kernels().apply(step.bucket(), nullptr);
    } else if (has_momentum(step.bucket().feedback)) {
      step.kernels().blend(step.bucket());
    }
  }
};

}  // namespace

const Compressor& dense() {
  static const Dense compressor;
  return compressor;
}

}  // namespace arc_topk
