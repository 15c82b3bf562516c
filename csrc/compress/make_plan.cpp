#include "compress/make_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "kernels/directions.h"
#include "kernels/levels.h"

namespace arc_topk {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string why_dense(const Config& config, const Compressor& compressor, const Shape& shape,
                      const Matrix& matrix, double link_cost) {
  if (!compressor.compresses()) return "compressor 'dense'";
  if (shape.numel == 0) return "empty";
  if (shape.dims < 2 && !config.row_width) return "fewer than 2 dimensions and no row_width";
  if (config.compress_without_gain) return "";
  if (matrix.ratio == 1 && !config.rank) return "ratio 1";  // on bytes too, where all rows pay
  if (static_cast<double>(matrix.wire_bytes) * link_cost < static_cast<double>(matrix.dense_bytes))
    return "";
  std::string bytes = std::to_string(matrix.wire_bytes);
  if (link_cost != 1) bytes += " x " + std::to_string(link_cost).substr(0, 4);
  return "compressed bytes " + bytes + " >= dense " + std::to_string(matrix.dense_bytes);
}

// Rows and columns must fit into a Piece, and rows that are picked into an index of 32 bits.
void check_size(int64_t count, int64_t most, const char* what) {
  if (count <= most) return;
  throw std::invalid_argument("arc_topk: a tensor has " + std::to_string(count) + " " + what +
                              "; expected at most " + std::to_string(most) +
                              ": split the parameter, or give a larger row_width");
}

int64_t state_bytes(const Config& config, const Compressor& compressor, const Types& types,
                    int64_t numel) {
  int64_t arrays = 0;
  if (compressor.compresses()) {
    arrays = own_states(config.feedback) + (shares_estimate(config.feedback) ? 1 : 0);
  } else if (has_momentum(config.feedback)) {
    arrays = 1;  // dense under EF21M: the momentum of the mean is all there is to remember
  }
  return arrays * size_of(types.state) * numel;
}

// Bytes have too few levels for many ranks: bfloat16 is better there.
DType wire_for(const Config& config, DType gradient, int world_size) {
  const DType asked = config.wire_dtype.value_or(gradient);
  return asked == DType::kU8 && world_size > kMostRanksOfLevels ? DType::kBF16 : asked;
}

}  // namespace

int64_t kept_rows(double ratio, int64_t rows) {
  // The product may land a hair above the integer that was meant: 0.07 * 100 is 7.000000000000001.
  const auto kept =
      static_cast<int64_t>(std::ceil(ratio * static_cast<double>(rows) * (1 - 1e-12)));
  return std::clamp<int64_t>(kept, 1, std::max<int64_t>(rows, 1));
}

// What the sum on its way rounds enters h and no h_i: h drifts, by the square root of the steps.
// float16 rounds 8 times less than bfloat16, and an eighth of the drift a step makes 64 times as
// many steps. Sums of bytes round nothing, and what is left is what h itself is rounded by.
// docs/algorithm.md has figures.
int64_t resync_every(const Config& config, const Compressor& compressor, const Types& types,
                     int world_size) {
  if (!shares_estimate(config.feedback) || compressor.gathers() || !compressor.compresses() ||
      world_size == 1) {
    return 0;
  }
  constexpr int64_t kBF16 = 32;
  // Dear nowhere: 2 % of the rows' bytes at ratio 0.1, as are 4 times as many steps for bytes.
  constexpr int64_t kF32 = 512;
  const int64_t by_wire = types.wire == DType::kBF16  ? kBF16
                          : types.wire == DType::kF16 ? 64 * kBF16
                          : types.wire == DType::kF32 ? kF32
                          : types.wire == DType::kU8  ? 4 * kF32
                                                      : 0;
  return config.resync_every.value_or(by_wire);
}

Types types_for(const Config& config, const Compressor& compressor, DType gradient,
                int world_size) {
  Types types{};
  types.gradient = gradient;
  types.state = gradient == DType::kF64 ? DType::kF64 : config.state_dtype.value_or(DType::kF32);
  types.wire = wire_for(config, gradient, world_size);
  const bool asks_for_bytes = compressor.factorises() && config.wire_dtype == DType::kU8;
  // As with state: who computes in float64 has numbers that bfloat16 has no room for.
  const bool narrow = config.sketch_dtype && gradient != DType::kF64;
  types.sketch = asks_for_bytes ? types.wire : narrow ? *config.sketch_dtype : types.work();
  if (types.sends_directions()) types.norm_bytes = kNormBytes * world_size;
  types.dense = compressor.dense_type(types);
  return types;
}

Matrix view_as_matrix(const Config& config, const Compressor& compressor, const Shape& shape,
                      const Types& types, int world_size) {
  Matrix matrix{};
  matrix.ratio = shape.ratio.value_or(config.ratio);
  if (compressor.by_element()) {
    matrix.cols = 1;
  } else if (config.row_width) {
    matrix.cols = std::min(*config.row_width, std::max<int64_t>(shape.numel, 1));
  } else {
    matrix.cols = std::max<int64_t>(1, shape.numel / std::max<int64_t>(shape.rows, 1));
  }
  matrix.rows = divide_up(shape.numel, matrix.cols);
  matrix.dense_bytes = shape.numel * size_of(types.dense);
  const auto count = [&] {
    matrix.kept = compressor.kept(matrix, types, config);
    matrix.wire_bytes = compressor.wire_bytes(matrix, types, config);
  };
  count();
  matrix.state_bytes = state_bytes(config, compressor, types, shape.numel);
  matrix.why_dense = why_dense(config, compressor, shape, matrix, compressor.link_cost(world_size));
  // Nothing travels in bytes without a residual: what is no matrix is one of a single row.
  if (types.sends_directions() && shape.numel > 0 && !matrix.why_dense.empty()) {
    matrix.rows = 1;
    matrix.cols = shape.numel;
    matrix.why_dense.clear();
    count();
  }
  matrix.resync_bytes = shape.numel * size_of(types.work());
  if (!matrix.why_dense.empty()) {
    matrix.resync_bytes = 0;
    matrix.kept = 0;
    matrix.wire_bytes = matrix.dense_bytes;
  }
  if (matrix.kept > 0) {
    matrix.state_bytes += compressor.factor_bytes(matrix, types);
    check_size(matrix.rows, std::numeric_limits<int32_t>::max(), "rows");
    check_size(matrix.cols, kMostRows, "columns");
  } else {
    check_size(shape.numel, kMostRows, "elements and stays dense");
  }
  return matrix;
}

Plan make_plan(const Config& config, const Compressor& compressor, DType gradient,
               const std::vector<Shape>& shapes, int world_size) {
  Plan plan;
  plan.types = types_for(config, compressor, gradient, world_size);
  int64_t num_keys = 0;
  for (const Shape& shape : shapes) {
    const Matrix matrix = view_as_matrix(config, compressor, shape, plan.types, world_size);
    Segment s{};
    s.offset = plan.numel;
    s.numel = shape.numel;
    s.stream = shape.stream;
    s.rows = shape.numel;
    s.cols = 1;
    if (matrix.kept > 0) {
      s.rows = matrix.rows;
      s.cols = matrix.cols;
      s.kept = matrix.kept;
      s.flag = plan.num_flags;
      plan.num_flags += plan.types.flag_numbers();
      if (!compressor.factorises()) {
        s.key = num_keys;
        s.pick = plan.num_picks;
        num_keys += s.rows;
        if (s.has_many_rows()) s.large = plan.num_large++;
        plan.num_picks += s.kept;
      }
      plan.max_cols = std::max(plan.max_cols, s.cols);
      plan.dense = false;
    }
    plan.numel += shape.numel;
    plan.wire_bytes += matrix.wire_bytes;
    plan.dense_bytes += shape.numel * size_of(gradient);
    plan.segments.push_back(s);
  }
  if (!plan.dense) plan.resync_every = resync_every(config, compressor, plan.types, world_size);
  plan.in_place = plan.dense && plan.types.dense == plan.types.gradient;
  (plan.dense ? dense() : compressor).lay_out(plan, config);
  return plan;
}

}  // namespace arc_topk
