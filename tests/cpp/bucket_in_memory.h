// A bucket with everything it points to, filled with random numbers; and number types, each element
// decoded and rounded by plain arithmetic in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace arc_topk::testing {

// --- number types
// -----------------------------------------------------------------------------------

struct Format {
  int mantissa_bits;
  int exponent_bits;
  int min_exponent() const { return 2 - (1 << (exponent_bits - 1)); }
  int max_exponent() const { return (1 << (exponent_bits - 1)) - 1; }
};

inline Format format_of(DType type) {  // of 16 bits
  return type == DType::kBF16 ? Format{7, 8} : Format{10, 5};
}

// The nearest number of the type, ties to even; by way of float, as torch does it.
inline double rounded(DType type, double x) {
  if (type == DType::kF64) return x;
  x = static_cast<float>(x);
  if (type == DType::kF32 || x == 0 || !std::isfinite(x)) return x;
  const Format format = format_of(type);
  const int exponent = std::max(std::ilogb(x), format.min_exponent());
  const double unit = std::ldexp(1.0, exponent - format.mantissa_bits);
  const double nearest = std::nearbyint(x / unit) * unit;
  const double limit =
      std::ldexp(2.0 - std::ldexp(1.0, -format.mantissa_bits), format.max_exponent());
  return std::abs(nearest) > limit ? std::copysign(INFINITY, x) : nearest;
}

inline double decode_16_bits(DType type, uint16_t bits) {
  const Format format = format_of(type);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const int exponent = (bits & 0x7FFF) >> format.mantissa_bits;
  if (exponent == (1 << format.exponent_bits) - 1) return mantissa != 0 ? NAN : sign * INFINITY;
  const int hidden = exponent > 0 ? 1 << format.mantissa_bits : 0;
  const int power = std::max(exponent, 1) - format.max_exponent() - format.mantissa_bits;
  return sign * std::ldexp(hidden + mantissa, power);
}

// Of a number that the type has.
inline uint16_t encode_16_bits(DType type, double x) {
  const Format format = format_of(type);
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const int top = ((1 << format.exponent_bits) - 1) << format.mantissa_bits;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | top | 1 << (format.mantissa_bits - 1));
  if (std::isinf(x)) return static_cast<uint16_t>(sign | top);
  if (x == 0) return static_cast<uint16_t>(sign);
  const int exponent = std::max(std::ilogb(x), format.min_exponent());
  const int digits = static_cast<int>(std::ldexp(std::abs(x), format.mantissa_bits - exponent));
  // Without the hidden bit the exponent's field is 0, which means the same as 1.
  return static_cast<uint16_t>(
      sign | (((exponent - format.min_exponent()) << format.mantissa_bits) + digits));
}

inline double get(DType type, const void* array, int64_t i) {
  if (type == DType::kF64) return static_cast<const double*>(array)[i];
  if (type == DType::kF32) return static_cast<const float*>(array)[i];
  if (type == DType::kU8) return static_cast<const uint8_t*>(array)[i];
  return decode_16_bits(type, static_cast<const uint16_t*>(array)[i]);
}

inline void set(DType type, void* array, int64_t i, double x) {
  if (type == DType::kF64) {
    static_cast<double*>(array)[i] = x;
  } else if (type == DType::kF32) {
    static_cast<float*>(array)[i] = static_cast<float>(x);
  } else if (type == DType::kU8) {
    static_cast<uint8_t*>(array)[i] = static_cast<uint8_t>(std::clamp(x, 0.0, 255.0));
  } else {
    static_cast<uint16_t*>(array)[i] = encode_16_bits(type, rounded(type, x));
  }
}

// --- the bucket
// -------------------------------------------------------------------------------------

inline constexpr FeedbackKind kAllFeedback[] = {FeedbackKind::kNone, FeedbackKind::kEF14,
                                                FeedbackKind::kEF21, FeedbackKind::kEF21M};

struct Tensor {
  int64_t numel;
  int64_t cols = 1;
  int64_t kept = 0;  // 0: dense
  bool dense_in_first = true;
};

struct BucketSpec {
  std::vector<Tensor> tensors;
  FeedbackKind feedback = FeedbackKind::kNone;
  DType gradient = DType::kF32;
  DType state = DType::kF32;
  DType wire = DType::kF32;
  double wire_scale = 1;
  int64_t sketch_dim = 4;
  int world_size = 3;
  double eta = 0.1;
  int64_t piece_numel = 150;
  bool may_be_unused = true;
  bool result_in_gradient = false;
  double loss_scale = 0;  // 0: no scaler; else the step before's was twice as large
};

inline std::string describe(const BucketSpec& s) {
  const auto name = [](DType type) {
    return type == DType::kF32    ? "f32"
           : type == DType::kF64  ? "f64"
           : type == DType::kBF16 ? "bf16"
           : type == DType::kF16  ? "f16"
                                  : "u8";
  };
  return "feedback " + std::to_string(static_cast<int>(s.feedback)) + ", gradient " +
         name(s.gradient) + ", state " + name(s.state) + ", wire " + name(s.wire) + ", r " +
         std::to_string(s.sketch_dim) + ", loss scale " + std::to_string(s.loss_scale);
}

class BucketInMemory {
 public:
  explicit BucketInMemory(const BucketSpec& spec) : spec(spec), random_(7) {
    const DType work = work_type(spec.gradient);
    int64_t dense = 0, large = 0, first = 0, second = 0, flags = 0, keys = 0, picks = 0, numel = 0;
    for (const Tensor& tensor : spec.tensors) {
      Segment s{};
      s.offset = numel;
      s.numel = tensor.numel;
      s.cols = tensor.cols;
      s.rows = (tensor.numel + tensor.cols - 1) / tensor.cols;
      s.kept = tensor.kept;
      s.stream = static_cast<uint32_t>(segments.size()) + 40;
      s.dense_in_first = tensor.dense_in_first;
      numel += s.numel;
      if (s.compressed()) {
        s.flag = flags++;
        s.sketch = first;
        s.packed = second;
        s.key = keys;
        s.pick = picks;
        first += s.rows * spec.sketch_dim;
        if (spec.wire == DType::kU8) first += s.rows;
        second += s.kept * s.cols;
        keys += s.rows;
        if (s.has_many_rows()) s.large = large++;
        picks += s.kept;
      } else {
        int64_t& at = s.dense_in_first ? first : second;
        s.packed = at;
        at += s.numel;
      }
      const auto index = static_cast<int64_t>(segments.size());
      const int64_t rows = std::max<int64_t>(1, spec.piece_numel / s.cols);
      for (int64_t row = 0; row < s.rows; row += rows) {
        pieces.push_back({static_cast<uint32_t>(index), static_cast<uint32_t>(row),
                          static_cast<uint32_t>(std::min(row + rows, s.rows)), 0,
                          static_cast<uint32_t>(s.cols)});
      }
      segments.push_back(s);
      dense += !s.compressed();
    }
    const int states = own_states(spec.feedback);
    b = Bucket{};
    b.segments = segments.data();
    b.num_segments = static_cast<int64_t>(segments.size());
    b.num_dense = dense;
    b.num_large = large;
    b.pieces = pieces.data();
    b.num_pieces = static_cast<int64_t>(pieces.size());
    b.numel = numel;
    b.may_be_unused = spec.may_be_unused;
    b.result_in_gradient = spec.result_in_gradient;
    b.gradient_type = spec.gradient;
    b.state_type = spec.state;
    b.wire_type = spec.wire;
    b.feedback = spec.feedback;
    b.eta = spec.eta;
    b.sketch_dim = spec.sketch_dim;
    b.gradient = array(numel, spec.gradient);
    if (states > 0) b.own_a = array(numel, spec.state);
    if (states > 1) b.own_b = array(numel, spec.state);
    if (shares_estimate(spec.feedback)) b.shared = array(numel, spec.state);
    b.first = array(first, work);
    b.second = array(second, spec.wire);
    b.flag_type = spec.wire == DType::kU8 ? work : spec.wire;
    b.flags = array(flags, b.flag_type);
    b.picks = static_cast<int32_t*>(bytes(picks * 4));
    b.used = static_cast<uint8_t*>(bytes(b.num_segments));
    b.bad = static_cast<uint8_t*>(bytes(b.num_segments));
    b.outcome = static_cast<Outcome*>(bytes(b.num_segments));
    b.withheld = bytes(b.num_segments * size_of(spec.state));
    b.is_withheld = static_cast<uint8_t*>(bytes(b.num_segments));
    b.scratch = bytes(keys * (work == DType::kF64 ? 8 : 4));  // the CPU's: its keys
    b.energy = &energy;
    b.world_size = spec.world_size;
    b.wire_scale = spec.wire_scale;
    if (spec.loss_scale != 0) {
      b.loss_scale = scale(spec.loss_scale);
      b.scale_before = scale(2 * spec.loss_scale);
    }
    std::fill_n(b.used, b.num_segments, uint8_t{1});
    first_numel = first;
    second_numel = second;
  }
  BucketInMemory(const BucketInMemory&) = delete;
  BucketInMemory& operator=(const BucketInMemory&) = delete;

  // V^T with rows no longer than needed, NaN where they have no number.
  Projection projection() {
    int64_t cols = 1;
    for (const Segment& s : segments) cols = std::max(cols, s.compressed() ? s.cols : 1);
    const int64_t stride = (cols + 15) / 16 * 16;
    v.assign(static_cast<size_t>(spec.sketch_dim * stride), NAN);
    for (int64_t k = 0; k < spec.sketch_dim; ++k) {
      for (int64_t i = 0; i < cols; ++i)
        v[static_cast<size_t>(k * stride + i)] = std::normal_distribution<float>()(random_);
    }
    return {v.data(), stride};
  }

  double gradient(int64_t i) const { return get(b.gradient_type, b.gradient, i); }
  double own_a(int64_t i) const { return b.own_a ? get(b.state_type, b.own_a, i) : 0; }
  double own_b(int64_t i) const { return b.own_b ? get(b.state_type, b.own_b, i) : 0; }
  double shared(int64_t i) const { return get(b.state_type, b.shared, i); }
  double first(int64_t i) const { return get(work_type(b.gradient_type), b.first, i); }
  double second(int64_t i) const { return get(b.wire_type, b.second, i); }
  void set_gradient(int64_t i, double x) { set(b.gradient_type, b.gradient, i, x); }

  // Another gradient.
  void refill(unsigned seed) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < b.numel; ++i)
      set_gradient(i, std::normal_distribution<double>()(random));
  }

  // Distinct ascending picks of every compressed tensor.
  void pick_at_random() {
    for (const Segment& s : segments) {
      std::vector<int32_t> rows(static_cast<size_t>(s.rows));
      for (int64_t j = 0; j < s.rows; ++j) rows[static_cast<size_t>(j)] = static_cast<int32_t>(j);
      std::shuffle(rows.begin(), rows.end(), random_);
      std::sort(rows.begin(), rows.begin() + s.kept);
      std::copy_n(rows.begin(), s.kept, b.picks + s.pick);
    }
  }

  // Every byte that is the bucket's, to tell whether something changed, or is the same elsewhere.
  std::vector<std::vector<unsigned char>> contents() const {
    std::vector<std::vector<unsigned char>> all;
    for (const auto& memory : memory_) all.push_back(*memory);
    return all;
  }

  const BucketSpec spec;
  Bucket b;
  std::vector<Segment> segments;
  std::vector<Piece> pieces;
  std::vector<float> v;
  Energy energy{0, 0};
  int64_t first_numel;
  int64_t second_numel;

 private:
  void* bytes(int64_t count) {
    memory_.push_back(std::make_unique<std::vector<unsigned char>>(static_cast<size_t>(count)));
    return memory_.back()->data();
  }
  const double* scale(double x) {
    auto* at = static_cast<double*>(bytes(2 * sizeof(x)));
    at[0] = x;
    at[1] = 1 / x;
    return at;
  }
  void* array(int64_t numel, DType type) {
    void* at = bytes(numel * size_of(type));
    for (int64_t i = 0; i < numel; ++i) {
      const double x = std::normal_distribution<double>()(random_);
      set(type, at, i, type == DType::kU8 ? 128 + 50 * x : x);
    }
    return at;
  }

  std::mt19937 random_;
  std::vector<std::unique_ptr<std::vector<unsigned char>>> memory_;
};

}  // namespace arc_topk::testing
