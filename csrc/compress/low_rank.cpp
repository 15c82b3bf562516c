// Low rank, PowerSGD's form (Vogels, Karimireddy, Jaggi, NeurIPS 2019): two factors of k columns
// are all-reduced, P = mean X_i W and R = mean X_i^T P^ with P^ = orth(P), and everybody applies C
// = P^ R^T. W (n x k) is the R of the step before, its columns at unit norm: the subspace is
// iterated from step to step.
//
//   first payload, sketch type:  flags | m x k products P_i | dense, of that type
//   second payload,  wire type:  R_i^T, k x n | dense tensors of the wire's type
//
// What rank i has sent is C_i = P^ R_i^T, with R_i as rounded to the wire: the rest stays in e_i.
// On an uint8 wire the first payload is kernels/directions.h's, and every tensor is a matrix, one
// of a single row if it is no other: its P^ is 1, and R_i the tensor itself.
#include "kernels/low_rank.h"

#include <algorithm>

#include "compress/compressor.h"
#include "kernels/directions.h"

namespace arc_topk {
namespace {

const LowRankKernels& kernels_of(const Step& step) { return *step.kernels().low_rank(); }

class LowRank final : public Compressor {
 public:
  const char* name() const override { return "low_rank"; }
  bool factorises() const override { return true; }

  // The most columns whose bytes are the ratio's share of the gradient's, or as many as are asked
  // for; with min(m, n) of them C is the mean message itself.
  int64_t kept(const Matrix& x, const Types& types, const Config& config) const override {
    const int64_t column = column_bytes(x, types);
    const int64_t matrix = x.dense_bytes / size_of(types.dense) * size_of(types.gradient);
    // A product may land a hair below the integer that was meant.
    const double bytes = x.ratio * static_cast<double>(matrix) * (1 + 1e-12);
    const int64_t k = config.rank.value_or(
        static_cast<int64_t>(bytes / static_cast<double>(std::max<int64_t>(column, 1))));
    return std::clamp<int64_t>(k, 1, std::max<int64_t>(1, std::min(x.rows, x.cols)));
  }

  // P^ and R_i in the work type, W in float32.
  int64_t factor_bytes(const Matrix& x, const Types& types) const override {
    return x.kept * (size_of(types.work()) * (x.rows + x.cols) + size_of(DType::kF32) * x.cols);
  }

  // s k m + w k n, and the flag; of bytes, norms as well.
  int64_t wire_bytes(const Matrix& x, const Types& types, const Config&) const override {
    return x.kept * column_bytes(x, types) + types.flag_numbers() * size_of(types.sketch);
  }

  void lay_out(Plan& plan, const Config&) const override {
    const bool directions = plan.types.sends_directions();
    int64_t& first = plan.first_numel;
    int64_t& second = plan.second_numel;
    plan.flags_in_first = true;
    plan.flags_at = 0;
    (directions ? plan.direction_bytes : first) = plan.num_flags;
    for (Segment& s : plan.segments) {
      FactorPlace& place = plan.factors.emplace_back();
      if (s.compressed()) {
        s.sketch = first;
        first += (s.rows + plan.types.units()) * s.kept;
        s.packed = second;
        second += s.kept * s.cols;
        lay_out_factors(plan, s, place);
        if (!directions) continue;
        place.bytes = plan.direction_bytes;
        plan.direction_bytes += s.kept * (direction_rows(s.rows) + plan.types.norm_bytes);
      } else {
        plan.append_dense(s);
      }
    }
  }

  void prepare(Step& step) const override {
    step.enter(Phase::kPrepare);
    kernels_of(step).prepare(step.bucket(), step.seed(), step.number());
  }

  void first(Step& step) const override {
    const Bucket& bucket = step.bucket();
    const LowRankKernels& kernels = kernels_of(step);

    step.all_reduce_first(Phase::kFirstCollective);

    step.enter(Phase::kSelect);
    kernels.orthonormalise(bucket);

    step.enter(Phase::kPack);
    kernels.multiply_back(bucket);
  }

  bool has_second() const override { return true; }
  void second(Step& step) const override { step.all_reduce_second(Phase::kSecondCollective); }

  void last(Step& step) const override {
    step.enter(Phase::kApply);
    kernels_of(step).apply(step.bucket());
  }

  void reclaim(Step& step) const override { kernels_of(step).reclaim(step.bucket()); }
  void settle(Step& step) const override { kernels_of(step).settle(step.bucket()); }

 private:
  static int64_t column_bytes(const Matrix& x, const Types& types) {
    const int64_t rows = types.sends_directions() ? direction_rows(x.rows) : x.rows;
    return size_of(types.sketch) * rows + types.norm_bytes + size_of(types.wire) * x.cols;
  }

  static void lay_out_factors(Plan& plan, const Segment& s, FactorPlace& place) {
    const int64_t strips = (s.rows + kStripRows - 1) / kStripRows;
    const int64_t right = s.kept * factor_stride(s.cols);
    place = {plan.num_left, plan.num_right, plan.num_partial, 0};
    plan.num_left += s.rows * s.kept;
    plan.num_right += right;
    const int64_t windows = (s.cols + kWindowCols - 1) / kWindowCols;
    // Whole cache lines, for what comes behind is read by vectors.
    const int64_t products = (windows * s.rows * s.kept + 15) / 16 * 16;
    plan.num_partial += std::max(strips * right, products);
  }
};

}  // namespace

const Compressor& low_rank() {
  static const LowRank compressor;
  return compressor;
}

}  // namespace arc_topk
