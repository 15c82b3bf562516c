// The steps of kernels.h as launches of bodies, over whatever launches them: CUDA, or a loop on the
// host that tests run. An ARC-Top-K bucket takes scan, prepare, select, pack and apply, and one
// more where tensors under a shared estimate stay dense.
#pragma once

#include <cmath>

#include "kernels/cuda/apply.h"
#include "kernels/cuda/dense.h"
#include "kernels/cuda/low_rank_steps.h"
#include "kernels/cuda/prepare.h"
#include "kernels/cuda/project.h"
#include "kernels/cuda/select_many.h"

namespace arc_topk::cuda {

// Launcher: launch(bucket, name, body, blocks), and read(bucket, address) of a number in the
// device's memory, for which it waits.
template <class Launcher>
class Steps : public Kernels {
 public:
  Steps() = default;
  Steps(const Steps&) = delete;  // low_rank_ has the address of launcher_
  Steps& operator=(const Steps&) = delete;

  Grain grain() const override { return {kGrain, true, kWindowCols}; }

  const LowRankKernels* low_rank() const override { return &low_rank_; }
  int64_t scratch_bytes(const Bucket& b) const override { return Scratch::bytes(b); }

  void project(const Bucket& b, float* data, int64_t stride, int64_t begin, int64_t end,
               uint64_t seed, uint64_t step) const override {
    // prepare() reads whole vectors, of whose last numbers it uses those before `end`.
    const int64_t whole = smaller(divide_up(end, 4) * 4, stride);
    const Project body{data, stride, begin, whole, b.sketch_dim, seed, step};
    launch(b, "project", body, body.blocks());
  }

  void reclaim(const Bucket& b) const override {
    with_work_type(b, [&]<class T>(T) {
      const Reclaim<T> body{b, static_cast<T>(share_of_sent(b)), Levels<T>(b)};
      launch(b, "reclaim", body, b.num_pieces);
    });
  }

  void prepare(const Bucket& b, const Projection* v) const override {
    launch_scan(launcher_, b);
    with_feedback(b, [&]<class Feedback, class T>(const Feedback& feedback, T) {
      with_gradient<T>(b.gradient_type, [&]<class G>(G) {
        if (b.state_type == numbers::kTypeOf<T>) {
          prepare_with<G, T>(b, feedback, v, T{});
        } else {
          prepare_with<G, AnyType>(b, feedback, v, T{});
        }
      });
    });
  }

  void select(const Bucket& b, const Keys& keys) const override {
    with_work_type(b, [&]<class T>(T) {
      const KeyMaker<T> maker(b, keys);
      launch(b, "select", Select<T>{maker}, b.num_segments);
      if (!Scratch::selects_by_many(b)) return;
      for (int from = 8 * sizeof(T); from > 0; from = Digit<Key<T>>::below(from).shift) {
        launch(b, "count_digit", CountDigit<T>{maker, from}, b.num_pieces);
      }
      launch(b, "count_taken", CountTaken<T>{maker}, b.num_pieces);
      launch(b, "take", TakeMany<T>{maker}, b.num_pieces);
    });
  }

  void pack(const Bucket& b) const override { pack_with(b, PackMode::kPayload, nullptr); }
  void commit(const Bucket& b, const Gathered* gathered) const override {
    pack_with(b, PackMode::kCommit, gathered);
  }
  void pack_and_commit(const Bucket& b) const override { pack_with(b, PackMode::kBoth, nullptr); }

  void apply(const Bucket& b, const Gathered* gathered) const override {
    const bool reduced = gathered == nullptr;
    with_work_type(b, [&]<class T>(T) {
      const DenseMean<T> mean(b, reduced ? DenseSource::kPayload : DenseSource::kMessages,
                              gathered);
      apply_with(b, mean, reduced);
    });
  }
  // What is not h as it lies, apply() and blend() have put into the gradient.
  bool publish(const Bucket& b) const override { return !hands_out_estimate(b); }

  void divide(const Bucket& b) const override {
    with_work_type(b, [&]<class T>(T) {
      launch(b, "divide", Divide<T>{b, static_cast<T>(1.0 / b.world_size)}, b.num_pieces);
    });
  }

  void remember(const Bucket& b) const override {
    const bool momentum = has_momentum(b.feedback);
    with_work_type(b, [&]<class T>(T) {
      launch(b, "remember",
             CopyGradient<T>{b, momentum ? b.own_b : b.own_a, momentum ? b.own_a : nullptr},
             b.num_pieces);
    });
  }

  bool adopt(const Bucket& b) const override {
    uint32_t* found = Scratch(b).counters + 1;
    with_work_type(b, [&]<class T>(T) {
      launch(b, "find_nonfinite", FindNonFinite<T>{b, found}, b.num_pieces);
    });
    if (b.num_pieces > 0 && launcher_.read(b, found) != 0) {
      launch(b, "clear", Clear{found}, 1);
      return false;
    }
    with_work_type(b, [&]<class T>(T) {
      launch(b, "adopt", CopyGradient<T>{b, b.shared, nullptr}, b.num_pieces);
    });
    return true;
  }

  void blend(const Bucket& b) const override {
    with_work_type(b, [&]<class T>(T) {
      apply_with(b, DenseMean<T>(b, DenseSource::kGradient, nullptr), true);
    });
  }

 protected:
  Launcher launcher_;

 private:
  template <class Body>
  void launch(const Bucket& b, const char* name, const Body& body, int64_t blocks) const {
    launch_on(launcher_, b, name, body, blocks);
  }

  template <class G, class S, class Feedback, class T>
  void prepare_with(const Bucket& b, const Feedback& feedback, const Projection* v, T) const {
    const Projection none{nullptr, 0};
    const T sketch_scale = static_cast<T>(1 / std::sqrt(static_cast<T>(b.sketch_dim)));
    launch(b, "prepare",
           Prepare<Feedback, G, S, T>{b, feedback, v != nullptr ? *v : none, sketch_scale,
                                      static_cast<T>(b.wire_scale), Levels<T>(b)},
           b.num_pieces);
  }

  void pack_with(const Bucket& b, PackMode mode, const Gathered* gathered) const {
    const Gathered none{};
    with_feedback(b, [&]<class Feedback, class T>(const Feedback& feedback, T) {
      launch(b, "pack",
             Pack<Feedback, T>{b, feedback, Wire<T>(b), Levels<T>(b), mode, gathered != nullptr,
                               gathered != nullptr ? *gathered : none},
             b.num_pieces);
    });
  }

  template <class T>
  void apply_with(const Bucket& b, const DenseMean<T>& mean, bool reduced) const {
    if (shares_estimate(b.feedback) && has_dense(b))
      launch(b, "mark_dense", MarkDense<T>{b, mean}, b.num_pieces);
    const Apply<T> body{b, mean, Levels<T>(b), static_cast<T>(b.eta), static_cast<T>(1 - b.eta)};
    if (reduced) {
      launch(b, "apply", body, b.num_pieces);
    } else {
      launch(b, "apply_gathered", ApplyGathered<T>{body}, b.num_pieces);
    }
  }
  static bool has_dense(const Bucket& b) { return b.num_dense > 0; }

  const LowRankSteps<Launcher> low_rank_{launcher_};
};

}  // namespace arc_topk::cuda
