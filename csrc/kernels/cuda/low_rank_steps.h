// The steps of kernels/low_rank.h as launches of bodies, over whatever launches them: see steps.h.
#pragma once

#include "kernels/cuda/apply.h"
#include "kernels/cuda/copy_dense.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/low_rank_columns.h"
#include "kernels/cuda/low_rank_rows.h"
#include "kernels/cuda/orthonormalise.h"
#include "kernels/low_rank.h"

namespace arc_topk::cuda {

template <class Launcher>
class LowRankSteps final : public LowRankKernels {
 public:
  explicit LowRankSteps(const Launcher& launcher) : launcher_(launcher) {}

  void prepare(const Bucket& b, uint64_t seed, uint64_t step) const override {
    launch(b, "draw", Draw{b, seed, step}, columns_of(b));
    launch_scan(launcher_, b);
    with_work_type(b, [&]<class T>(T) {
      with_gradient<T>(b.gradient_type, [&]<class G>(G) {
        if (b.num_dense > 0) {
          launch(b, "copy_dense", CopyDense<G, T>{b, static_cast<T>(b.wire_scale)}, b.num_pieces);
        }
        if (b.state_type == numbers::kTypeOf<T>) {
          launch(b, "prepare_factors", PrepareFactors<G, T, T>{b}, bands_of(b));
        } else {
          launch(b, "prepare_factors", PrepareFactors<G, AnyType, T>{b}, bands_of(b));
        }
      });
      launch(b, "finish_prepare", FinishPrepare<T>{b, Levels<T>(b)}, columns_of(b));
    });
  }

  void orthonormalise(const Bucket& b) const override {
    with_work_type(b, [&]<class T>(T) {
      if (remembers(b)) launch(b, "settle", Settle<T>{b, SettleMode::kCommit}, bands_of(b));
      launch(b, "orthonormalise", Orthonormalise<T>{b, Levels<T>(b)}, b.num_segments);
    });
  }

  void multiply_back(const Bucket& b) const override {
    with_work_type(b, [&]<class T>(T) {
      launch(b, "multiply_back", MultiplyBack<T>{b}, b.factors.num_tiles);
      launch(b, "send", Send<T>{b, Wire<T>(b), Levels<T>(b)}, columns_of(b));
    });
  }

  void apply(const Bucket& b) const override {
    with_work_type(b, [&]<class T>(T) {
      const DenseMean<T> mean(b, DenseSource::kPayload, nullptr);
      launch(b, "receive", Receive<T>{b, mean.factor, Levels<T>(b)}, columns_of(b));
      launch(b, "combine", Combine<T>{b}, bands_of(b));
      launch(b, "apply", Apply<T>{b, mean, Levels<T>(b), T(0), T(0)}, b.num_pieces);
    });
  }

  void settle(const Bucket& b) const override {
    if (!remembers(b)) return;
    with_work_type(b, [&]<class T>(T) {
      launch(b, "settle", Settle<T>{b, SettleMode::kBetweenSteps}, bands_of(b));
      launch(b, "forget", Forget<T>{b}, columns_of(b));
    });
  }

  void reclaim(const Bucket& b) const override {
    if (b.loss_scale == nullptr || !remembers(b)) return;
    with_work_type(
        b, [&]<class T>(T) { launch(b, "reclaim_factor", ReclaimFactor<T>{b}, columns_of(b)); });
  }

 private:
  template <class Body>
  void launch(const Bucket& b, const char* name, const Body& body, int64_t blocks) const {
    launch_on(launcher_, b, name, body, blocks);
  }

  const Launcher& launcher_;
};

}  // namespace arc_topk::cuda
