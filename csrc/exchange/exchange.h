// The engine: averages the gradients of a bucket over ranks, by the configured compressor and error
// feedback. Knows tensors and process groups; knows neither DDP nor Python.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "exchange/bucket_exchange.h"
#include "exchange/shared.h"

namespace arc_topk {

class Exchange {
 public:
  Exchange(Config config, Groups groups);
  // What is in the air has a second to end; then it is given up, however long its time-out.
  ~Exchange();

  // Begins the exchange of one bucket: `parameters` are the keys of its state, their gradients lie
  // one after the other in `buffer`. The future holds the averaged bucket: the buffer or, unless
  // `result_in_buffer`, an arena of this engine, valid until the bucket's next exchange. Call from
  // one thread at a time, in the same order of buckets on every rank. `index` only names the bucket
  // in errors. Throws, before anything is touched, where the bucket is still in the air, the engine
  // has failed or been stopped, or a parameter's state cannot be carried over.
  c10::intrusive_ptr<c10::ivalue::Future> start(const at::Tensor& buffer,
                                                const Parameters& parameters, int64_t index,
                                                bool result_in_buffer = false);
  // The same, all of it on the calling thread.
  at::Tensor run(const at::Tensor& buffer, const Parameters& parameters);

  // --- from one list of parameters to another, from one group to another ---
  // StateStore::check_bind().
  void check_bind(const Parameters& parameters, const std::vector<std::string>& names) const;
  // StateStore::bind(), before the first bucket or behind stop().
  void bind(const Parameters& parameters, const std::vector<std::string>& names, bool may_be_unused,
            const std::vector<double>& ratios = {});
  // Gradients are a GradScaler's from now on, and so are results: `scale` is the number that the
  // loss is multiplied with, which it changes in place. Undefined: none is. Behind stop().
  void set_loss_scale(at::Tensor scale);
  // Throws where a bucket is in the air.
  void check_idle() const;
  // Multiplies all error feedback. Not while a bucket is in the air.
  void rescale(double factor);
  // Gives up what is in the air, after a second's grace, and the groups of the lanes.
  // Buckets are refused until resume().
  void stop();
  Standing standing() const { return shared_.store.standing(); }
  bool failed() const { return shared_.lifecycle.failed(); }
  // Behind stop(): over these groups of as many ranks, from step `exchanges` on;
  // StateStore::resume().
  void resume(Groups groups, uint64_t exchanges, bool afresh);

  // --- checkpoints: between two steps, or std::runtime_error ---
  // StateStore::snapshot(), with the steps done so far.
  struct Saved {
    std::vector<std::pair<std::string, std::optional<Kept>>> slots;
    uint64_t exchanges = 0;
    uint64_t compressed = 0;
  };
  Saved snapshot();
  // StateStore::restore().
  void restore(std::vector<std::optional<Kept>> kept, uint64_t exchanges, uint64_t compressed);

  // Reads back what devices have summed up: waits for them. From any thread.
  Metrics metrics() const;
  void reset_metrics();
  // Of Config::adaptive. From any thread.
  std::optional<Adaptive::Report> choice() const;
  // metrics().steps, which waits for nothing.
  uint64_t steps() const { return shared_.metrics.read().steps; }

 private:
  // One thread at a time, or an error.
  std::unique_lock<std::mutex> enter();
  BucketExchange& exchange_of(const at::Tensor& buffer, const Parameters& parameters);
  void drain();
  void settle_between_steps();
  void halt() noexcept;

  Shared shared_;
  std::mutex entered_;
  std::unordered_map<const BucketState*, std::unique_ptr<BucketExchange>> exchanges_;
};

}  // namespace arc_topk
