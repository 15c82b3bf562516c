// The engine over the CUDA kernels' bodies, which run on the host: whole exchanges against those
// over the CPU's kernels, and what memory a bucket takes.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "cuda_on_host.h"
#include "exchange/exchange.h"
#include "fake_device.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::CudaOnHost;
using ::arc_topk::testing::fake_device;
using ::arc_topk::testing::NotingGroup;

// CPU tensors that count as a CUDA device's.
class CudaEngine : public ::testing::Test {
 protected:
  CudaEngine() { testing::register_fake_device(); }
  ~CudaEngine() override { on_cpu(); }
  static void on_cpu() { set_backend(c10::kCPU, {}); }
  static void on_device() {
    static const CudaOnHost kernels;
    set_backend(c10::kCPU, {&kernels, fake_device()});
  }
};

// --- exchanges -----------------------------------------------------------------------------------

const std::vector<std::vector<int64_t>> kShapes = {{64, 16}, {5}, {40, 24}, {3}, {2, 9000}};
constexpr int kSteps = 6;
constexpr int kBadStep = 3;  // is not finite in two matrices and a vector

std::vector<std::vector<size_t>> buckets_of(int step) {
  if (step <= kBadStep) return {{0}, {1, 2}, {3, 4}};
  return {{0}, {4, 2}, {1, 3}};  // only the first stays as it was
}

// The results of every step, a tensor for each parameter. Behind the step that is not finite they
// are wanted in the buffer, no longer as h lies.
std::vector<std::vector<at::Tensor>> run(const Config& config, at::ScalarType type,
                                         bool may_be_unused) {
  at::manual_seed(3);
  Exchange exchange(config, {c10::make_intrusive<NotingGroup>(), {}});
  std::vector<at::Tensor> parameters;
  std::vector<std::string> names;
  for (const auto& shape : kShapes) {
    names.push_back(std::to_string(parameters.size()));
    parameters.push_back(at::empty(shape, type));
  }
  exchange.bind(parameters, names, may_be_unused);
  std::vector<std::vector<at::Tensor>> results;
  for (int step = 0; step < kSteps; ++step) {
    std::vector<at::Tensor> gradients;
    for (const auto& shape : kShapes) gradients.push_back(at::randn(shape).to(type));
    if (step == 2) gradients[2].zero_();
    if (step == kBadStep) {
      gradients[0].view({-1})[100].fill_(NAN);
      gradients[2].view({-1})[0].fill_(-INFINITY);
      gradients[3][1].fill_(INFINITY);
    }
    std::vector<at::Tensor> averaged(kShapes.size());
    for (const std::vector<size_t>& bucket : buckets_of(step)) {
      std::vector<at::Tensor> flat, keys;
      for (const size_t i : bucket) {
        flat.push_back(gradients[i].view({-1}));
        keys.push_back(parameters[i]);
      }
      const auto future =
          exchange.start(at::cat(flat), keys, 0, /*result_in_buffer=*/step > kBadStep);
      future->wait();
      const at::Tensor result = future->value().isTensorList() ? future->value().toTensorVector()[0]
                                                               : future->value().toTensor();
      int64_t at = 0;
      for (const size_t i : bucket) {
        const int64_t numel = gradients[i].numel();
        averaged[i] = result.narrow(0, at, numel).clone();
        at += numel;
      }
    }
    results.push_back(std::move(averaged));
  }
  return results;
}

// Of what is not finite the first element says so.
void expect_same(const at::Tensor& cpu, const at::Tensor& device) {
  if (cpu.isfinite().all().item<bool>()) {
    EXPECT_TRUE(device.equal(cpu));
  } else {
    EXPECT_FALSE(device.isfinite().all().item<bool>());
    EXPECT_TRUE(!cpu.isnan().all().item<bool>() || device[0].isnan().item<bool>());
  }
}

TEST_F(CudaEngine, ExchangesAreTheCpus) {
  for (const char* compressor : {"dense", "arc_topk", "rand_k", "top_k", "low_rank"}) {
    for (FeedbackKind feedback :
         {FeedbackKind::kNone, FeedbackKind::kEF14, FeedbackKind::kEF21, FeedbackKind::kEF21M}) {
      if (compressor == std::string("low_rank") && shares_estimate(feedback)) continue;
      for (at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
        SCOPED_TRACE(std::string(compressor) + ", feedback " +
                     std::to_string(static_cast<int>(feedback)) + ", " + c10::toString(type));
        Config config;
        config.compressor = compressor;
        config.feedback = feedback;
        config.ratio = 0.2;
        for (const bool may_be_unused : {false, true}) {
          on_cpu();
          const auto cpu = run(config, type, may_be_unused);
          on_device();
          const auto device = run(config, type, may_be_unused);
          for (int step = 0; step < kSteps; ++step) {
            for (size_t i = 0; i < kShapes.size(); ++i) {
              SCOPED_TRACE("step " + std::to_string(step) + ", tensor " + std::to_string(i));
              expect_same(cpu[step][i], device[step][i]);
            }
          }
        }
      }
    }
  }
}

TEST_F(CudaEngine, ABufferAtAnOddAddressIsRefused) {
  on_device();
  StateStore store(Config{}, 2);
  const std::vector<at::Tensor> parameters = {at::empty({8, 8})};
  BucketState& state = store.make(parameters, at::zeros({64}), [](BucketState&) {});
  EXPECT_THROW(state.take(at::zeros({65}).narrow(0, 1, 64)), std::invalid_argument);
  EXPECT_NO_THROW(state.take(at::zeros({68}).narrow(0, 4, 64)));
}

// --- memory --------------------------------------------------------------------------------------

int64_t bytes_of(const std::vector<at::Tensor>& tensors) {
  int64_t sum = 0;
  for (const at::Tensor& t : tensors) sum += t.defined() ? static_cast<int64_t>(t.nbytes()) : 0;
  return sum;
}

// What a bucket takes besides state and payloads (of Top-K: what is gathered), as a share of these.
double overhead(const BucketState& s) {
  int64_t payload =
      bytes_of(s.first) + bytes_of(s.second) + bytes_of(std::vector<at::Tensor>{s.gathered});
  int64_t rest = bytes_of({s.picks, s.marks, s.scratch, s.energy, s.withheld, s.is_withheld});
  rest += static_cast<int64_t>(s.plan.segments.size() * sizeof(Segment));
  rest += static_cast<int64_t>(s.pieces.size() * sizeof(Piece));
  // A rank's own message is as many bytes as any that it gathers.
  if (s.gathered.defined())
    rest += bytes_of(s.message) - static_cast<int64_t>(s.gathered.nbytes()) / 4;
  return static_cast<double>(rest) / static_cast<double>(payload);
}

TEST_F(CudaEngine, MemoryIsThatOfThePayloads) {
  on_device();
  const std::vector<std::vector<int64_t>> block = {{2304, 768}, {2304}, {768, 768},  {768},
                                                   {3072, 768}, {3072}, {768, 3072}, {768}};
  std::vector<std::vector<int64_t>> uneven = {{50000, 64}};
  for (int i = 0; i < 40; ++i) uneven.push_back({64, 64});
  const std::vector<std::vector<int64_t>> large = {{1024, 1024}, {512, 4096}, {128, 16384}};
  for (const auto& shapes : {block, uneven, large}) {
    for (const char* compressor : {"arc_topk", "rand_k", "top_k"}) {
      for (double ratio : {0.05, 0.1}) {
        for (at::ScalarType type : {at::kFloat, at::kBFloat16}) {
          Config config;
          config.compressor = compressor;
          config.feedback = FeedbackKind::kEF21M;
          config.ratio = ratio;
          std::vector<at::Tensor> parameters;
          int64_t numel = 0;
          for (const auto& shape : shapes) {
            parameters.push_back(at::empty(shape, type));
            numel += parameters.back().numel();
          }
          StateStore store(config, 4);
          const BucketState& state =
              store.make(parameters, at::empty({numel}, type), [](BucketState&) {});
          // Rand-K's only payload are its rows: the 4 bytes that name one of 64 bf16 numbers count.
          const bool names_weigh =
              std::string(compressor) == "rand_k" && type == at::kBFloat16 && shapes[0][1] == 64;
          EXPECT_LE(overhead(state), names_weigh ? 0.071 : 0.05)
              << compressor << " " << ratio << " " << c10::toString(type) << ", first matrix "
              << shapes[0];
        }
      }
    }
  }
}

}  // namespace
}  // namespace arc_topk
