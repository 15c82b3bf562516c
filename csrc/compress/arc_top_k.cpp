// ARC-Top-K (arXiv 2510.26709): all ranks all-reduce a small random sketch P = X V / sqrt(r) of
// their messages, keep the K rows whose summed sketch is longest - the same rows everywhere, since
// the sum is - and all-reduce just those. No index travels.
//
//   first payload, sketch type:  flags | m x r sketches (, m units) | dense tensors of that type
//   second payload,  wire type:  K x n rows | dense tensors of the wire's type
//
// Units are what rows on an uint8 wire are rounded in: kernels/levels.h.
#include "compress/compressor.h"

namespace arc_topk {
namespace {

class ArcTopK final : public Compressor {
 public:
  const char* name() const override { return "arc_topk"; }
  bool sketches() const override { return true; }

  // s r m + K n w, and the flag; with units s m more.
  int64_t wire_bytes(const Matrix& x, const Types& types, const Config& config) const override {
    return size_of(types.sketch) * ((config.sketch_dim + types.units()) * x.rows + 1) +
           size_of(types.wire) * x.kept * x.cols;
  }

  void lay_out(Plan& plan, const Config& config) const override {
    int64_t& first = plan.first_numel;
    int64_t& second = plan.second_numel;
    plan.flags_in_first = true;
    plan.flags_at = 0;
    first = plan.num_flags;
    for (Segment& s : plan.segments) {
      if (s.compressed()) {
        s.sketch = first;
        first += s.rows * config.sketch_dim;
        first += s.rows * plan.types.units();
        s.packed = second;
        second += s.kept * s.cols;
      } else {
        plan.append_dense(s);
      }
    }
  }

  void prepare(Step& step) const override {
    step.enter(Phase::kPrepare);
    const Projection v = step.projection();
    step.kernels().prepare(step.bucket(), &v);
  }

  void first(Step& step) const override {
    const Bucket& bucket = step.bucket();
    const Kernels& kernels = step.kernels();

    step.all_reduce_first(Phase::kFirstCollective);

    step.enter(Phase::kSelect);
    kernels.select(bucket, {Keys::kSketch});

    step.enter(Phase::kPack);
    kernels.pack_and_commit(bucket);
  }

  bool has_second() const override { return true; }
  void second(Step& step) const override { step.all_reduce_second(Phase::kSecondCollective); }

  void last(Step& step) const override {
    step.enter(Phase::kApply);
    step.kernels().apply(step.bucket(), nullptr);
  }
};

}  // namespace

const Compressor& arc_top_k() {
  static const ArcTopK compressor;
  return compressor;
}

}  // namespace arc_topk
