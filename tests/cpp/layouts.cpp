// Any layout, from Python (tests/python/test_cuda_layouts.py, by ctypes): whole steps of the CUDA
// kernels' bodies against the CPU's kernels, and how often their threads come to each element.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda_against_cpu.h"
#include "cuda_on_host.h"
#include "kernels_on.h"

namespace arc_topk::testing {
namespace {

// As ctypes has it.
struct Layout {
  int64_t count;
  const int64_t* numel;
  const int64_t* cols;
  const int64_t* kept;  // 0: dense
  const uint8_t* dense_in_first;
  const uint8_t* contents;
  int64_t sketch_dim;
  double wire_scale;
  FeedbackKind feedback;
  DType gradient;
  DType state;
  DType wire;
};

// Of a tensor's gradient.
enum Contents : uint8_t { kNoise, kZeros, kEndsInNan, kBeginsWithInfinity };

BucketSpec spec_of(const Layout& layout) {
  BucketSpec spec;
  for (int64_t i = 0; i < layout.count; ++i) {
    // Rows alone travel in bytes.
    const bool first = layout.dense_in_first[i] != 0 || layout.wire == DType::kU8;
    spec.tensors.push_back({layout.numel[i], layout.cols[i], layout.kept[i], first});
  }
  spec.feedback = layout.feedback;
  spec.gradient = layout.gradient;
  spec.state = layout.state;
  spec.wire = layout.wire;
  spec.wire_scale = layout.wire_scale;
  spec.sketch_dim = layout.sketch_dim;
  // Without fields of their own:
  spec.may_be_unused = layout.count % 2 == 0;
  spec.loss_scale = layout.count % 3 == 0 ? 24 : 0;
  return spec;
}

void fill(const Layout& layout, BucketInMemory& x) {
  for (int64_t i = 0; i < layout.count; ++i) {
    const Segment& s = x.segments[static_cast<size_t>(i)];
    if (s.numel == 0) continue;
    const uint8_t contents = layout.contents[i];
    if (contents == kEndsInNan) x.set_gradient(s.offset + s.numel - 1, NAN);
    if (contents == kBeginsWithInfinity) x.set_gradient(s.offset, INFINITY);
    if (contents != kZeros) continue;
    for (int64_t j = 0; j < s.numel; ++j) x.set_gradient(s.offset + j, 0);
  }
}

// --- coverage ------------------------------------------------------------------------------------

// How often something was come to, by its number.
class Counts {
 public:
  explicit Counts(int64_t size) : counts_(static_cast<size_t>(size)) {}
  void add(int64_t i) {
    if (i < 0 || i >= static_cast<int64_t>(counts_.size()))
      throw Difference("a thread comes to number " + std::to_string(i) + " of " +
                       std::to_string(counts_.size()));
    ++counts_[static_cast<size_t>(i)];
  }
  void expect(const Counts& expected, const std::string& what) const {
    for (size_t i = 0; i < counts_.size(); ++i) {
      if (counts_[i] == expected.counts_[i]) continue;
      throw Difference(what + " " + std::to_string(i) + " is come to " +
                       std::to_string(counts_[i]) + " times, expected " +
                       std::to_string(expected.counts_[i]));
    }
  }

 private:
  std::vector<int> counts_;
};

// The elements that a block's threads come to.
template <int kVector>
struct CountElements {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {};

  Bucket b;
  Counts* elements;

  template <class Block>
  void operator()(Block& block, Shared&) const {
    const Piece& p = b.pieces[block.index()];
    const cuda::Range range = cuda::range_of(b.segments[p.segment], p);
    cuda::for_runs<kVector>(block, range.begin, range.end, [&](cuda::Run run) {
      for (int j = 0; j < kVector; ++j) {
        if (run.has(j)) elements->add(run.index + j);
      }
    });
  }
};

// Those of picked rows, and their places in the payload.
template <int kVector>
struct CountPicked {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {};

  Bucket b;
  Counts* elements;
  Counts* places;

  template <class Block>
  void operator()(Block& block, Shared&) const {
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    if (!s.compressed()) return;
    const cuda::PickRange range = cuda::picks_of(block, b, s, p);
    cuda::for_picked<kVector>(block, b, s, p, range,
                              [&](int, cuda::Run run, cuda::Run to, int64_t) {
                                for (int j = 0; j < kVector; ++j) {
                                  if (run.has(j)) elements->add(run.index + j);
                                  if (to.has(j)) places->add(to.index + j);
                                }
                              });
  }
};

template <int kVector>
void expect_each_element_once(const CudaBucket& x) {
  Counts elements(x.b.numel), once(x.b.numel);
  for (int64_t i = 0; i < x.b.numel; ++i) once.add(i);
  HostLauncher<Unwatched>().launch(x.b, "count", CountElements<kVector>{x.b, &elements},
                                   x.b.num_pieces);
  elements.expect(once, "with vectors of " + std::to_string(kVector) + ", element");
}

template <int kVector>
void expect_picked_rows_once(const CudaBucket& x) {
  Counts elements(x.b.numel), places(x.second_numel);
  Counts expected_elements(x.b.numel), expected_places(x.second_numel);
  for (const Segment& s : x.segments) {
    for (int64_t k = 0; k < s.kept; ++k) {
      const int64_t row = x.b.picks[s.pick + k];
      for (int64_t i = row * s.cols; i < std::min((row + 1) * s.cols, s.numel); ++i)
        expected_elements.add(s.offset + i);
      for (int64_t i = k * s.cols; i < (k + 1) * s.cols; ++i) expected_places.add(s.packed + i);
    }
  }
  HostLauncher<Unwatched>().launch(x.b, "count", CountPicked<kVector>{x.b, &elements, &places},
                                   x.b.num_pieces);
  elements.expect(expected_elements, "of picked rows, element");
  places.expect(expected_places, "of picked rows, place");
}

// --- for Python ----------------------------------------------------------------------------------

// Runs f; whether nothing was thrown. Else `message` says what.
template <class F>
bool succeeds(char* message, int64_t size, const F& f) {
  try {
    f();
    return true;
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<size_t>(size), "%s", error.what());
    return false;
  }
}

}  // namespace

#define ARC_TOPK_FOR_PYTHON extern "C" __attribute__((visibility("default")))

ARC_TOPK_FOR_PYTHON bool arc_topk_compare_steps(const Layout* layout, char* message, int64_t size) {
  return succeeds(message, size, [&] {
    const BucketSpec spec = spec_of(*layout);
    const auto change = [&](BucketInMemory& x) { fill(*layout, x); };
    const Kernels& kernels = kernels_on(kernels_asked_for());
    sketched_steps(spec, kernels, change);
    if (spec.wire != DType::kU8) random_step(spec, kernels, change);
  });
}

ARC_TOPK_FOR_PYTHON bool arc_topk_count_coverage(const Layout* layout, char* message,
                                                 int64_t size) {
  return succeeds(message, size, [&] {
    CudaBucket x(spec_of(*layout));
    expect_each_element_once<2>(x);
    expect_each_element_once<4>(x);
    expect_each_element_once<8>(x);
    x.pick_at_random();
    expect_picked_rows_once<2>(x);
    expect_picked_rows_once<4>(x);
  });
}

}  // namespace arc_topk::testing
