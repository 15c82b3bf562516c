// What a bucket's steps do now and then: the shared estimate becomes the mean again, and ranks
// compare what they hold. Of torch's own operations, which take memory as they need it.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include <stdexcept>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "exchange/bucket_exchange.h"
#include "exchange/check.h"

namespace arc_topk {

bool BucketExchange::must_resync() const {
  const auto every = static_cast<uint64_t>(plan().resync_every);
  return every > 0 && (number_ + 1) % every == 0;
}

// Of torch's own operations, on the current stream: it is rare, and takes memory as it needs it.
void BucketExchange::resync() {
  enter(Phase::kResync);
  const at::Tensor& mine = has_momentum(bucket().feedback) ? state_.own_b : state_.own_a;
  std::vector<at::Tensor> own, shared;
  std::vector<int64_t> sizes;
  for (const Segment& s : plan().segments) {
    if (!s.compressed()) continue;
    own.push_back(mine.narrow(0, s.offset, s.numel));
    shared.push_back(state_.shared.narrow(0, s.offset, s.numel));
    sizes.push_back(s.numel);
  }
  std::vector<at::Tensor> sum{at::cat(own).to(scalar_type_of(plan().types.work()))};
  // Before they are summed: nothing is computed of the sum, which is the same bits on every rank.
  sum[0].mul_(1.0 / bucket().world_size);
  collectives_.all_reduce(sum);
  const std::vector<at::Tensor> means = sum[0].split_with_sizes(sizes);
  for (size_t i = 0; i < means.size(); ++i) shared[i].copy_(means[i]);
}

bool BucketExchange::must_check() const {
  const auto every = static_cast<uint64_t>(shared_.config.check_every);
  return mode_ != Mode::kAverage && every > 0 && (number_ + 1) % every == 0;
}

// The one thing in a step that waits for a device on the host, and takes memory.
void BucketExchange::check(const at::Tensor& averaged) {
  enter(Phase::kCheck);
  static_assert(sizeof(Digests) == 2 * sizeof(int64_t));
  const int world_size = shared_.groups.main->getSize();
  at::Tensor mine = at::tensor({mode_ == Mode::kCompress ? digest_of(state_.picks) : 0,
                                digest_of(state_.shared.defined() ? state_.shared : averaged)},
                               at::kLong)
                        .to(state_.device);
  at::Tensor all = at::empty({2 * world_size}, mine.options());
  collectives_.all_gather(all, mine);
  const at::Tensor here = all.cpu();
  const auto* digests = static_cast<const Digests*>(here.const_data_ptr());
  const std::string what = difference(digests, world_size);
  if (what.empty()) return;
  throw std::runtime_error("in step " + std::to_string(number_ + 1) + " " + what +
                           "; expected the same bits on every rank: see that all run the same "
                           "versions of torch and arc-topk, and look at docs/troubleshooting.md");
}

}  // namespace arc_topk
