// The DDP communication hook: a bucket in, a future out. Runs on the autograd thread, without the
// GIL. Knows DDP's buckets; knows no kernel, no device, no Python.
#pragma once

#include <memory>
#include <torch/csrc/distributed/c10d/comm.hpp>

#include "exchange/exchange.h"

namespace arc_topk {

// Begins the exchange of a DDP bucket. Throws for what cannot be served: sparse or complex
// gradients. `result_in_buffer`: for hooks that somebody may wrap, who changes the future's value
// or reads the bucket's buffer behind it.
c10::intrusive_ptr<c10::ivalue::Future> exchange_bucket(Exchange& exchange,
                                                        c10d::GradBucket& bucket,
                                                        bool result_in_buffer);

// The one tensor in what exchange_bucket()'s future holds.
at::Tensor averaged(const c10::IValue& value);

class CommHook final : public c10d::CommHookInterface {
 public:
  explicit CommHook(std::shared_ptr<Exchange> exchange) : exchange_(std::move(exchange)) {}

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    return exchange_bucket(*exchange_, bucket, /*result_in_buffer=*/false);
  }
  at::Tensor parseHookResult(const c10::IValue& result) override { return averaged(result); }

 private:
  const std::shared_ptr<Exchange> exchange_;
};

}  // namespace arc_topk
