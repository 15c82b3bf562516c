#include "exchange/collectives.h"

#include <ATen/ops/from_blob.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace arc_topk {
namespace {

// One tensor for all messages, not a list of them: NCCL's gather into a list goes through an
// allocation and a copy of all of it. torch 2.15 has another name for it. A group without backends
// does everything itself (written in Python, say), of which torch passes on the list's form alone.
template <class Group>
c10::intrusive_ptr<c10d::Work> gather(Group& group, at::Tensor& gathered, at::Tensor& message) {
  if (!group.hasBackends()) {
    std::vector<std::vector<at::Tensor>> all{gathered.chunk(group.getSize())};
    std::vector<at::Tensor> mine{message};
    return group.allgather(all, mine);
  }
  if constexpr (requires { group.all_gather_single(gathered, message); }) {
    return group.all_gather_single(gathered, message);
  } else {
    return group._allgather_base(gathered, message);
  }
}

}  // namespace

void Collectives::begin(c10d::ProcessGroup& group, Metrics& metrics) {
  group_ = &group;
  metrics_ = &metrics;
}

c10::intrusive_ptr<c10d::Work> Collectives::start_all_reduce(
    std::vector<at::Tensor>& payload, const c10d::AllreduceOptions& options) {
  // Ring algorithms: every byte goes around once to be summed and once to be told, less a rank's
  // own.
  const double n = group_->getSize();
  const auto bytes = static_cast<int64_t>(payload[0].nbytes());
  count(bytes, 2 * (n - 1) / n * static_cast<double>(bytes));
  return group_->allreduce(payload, options);
}

void Collectives::all_reduce(std::vector<at::Tensor>& payload) { wait(*start_all_reduce(payload)); }

void Collectives::least(std::vector<double>& numbers) {
  // A copy: who gives up waiting leaves the group with what it works on.
  std::vector<at::Tensor> payload{
      at::from_blob(numbers.data(), {static_cast<int64_t>(numbers.size())}, at::kDouble).clone()};
  c10d::AllreduceOptions options;
  options.reduceOp = c10d::ReduceOp::MIN;
  wait(*start_all_reduce(payload, options));
  const auto* least = payload[0].const_data_ptr<double>();
  numbers.assign(least, least + numbers.size());
}

void Collectives::all_gather(at::Tensor& gathered, at::Tensor& message) {
  const auto bytes = static_cast<int64_t>(message.nbytes());
  count(bytes, static_cast<double>(group_->getSize() - 1) * static_cast<double>(bytes));
  wait(*gather(*group_, gathered, message));
}

void Collectives::wait(c10d::Work& work) {
  if (CommThread* lane = lanes_.current()) {
    lane->wait(work);
  } else {
    work.wait();
  }
}

void Collectives::count(int64_t wire_bytes, double link_bytes) {
  metrics_->collectives += 1;
  metrics_->wire_bytes += static_cast<uint64_t>(wire_bytes);
  metrics_->link_bytes += link_bytes;
}

}  // namespace arc_topk
