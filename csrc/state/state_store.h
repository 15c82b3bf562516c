// Error feedback by parameter: which bucket holds it now, and how it moves on.
//
// DDP rebuilds its buckets after the first backward: other parameters side by side, in another
// order. A bucket is therefore known by its list of parameters and how their gradients lie, never
// by its index. When an unknown list comes, a bucket is made for it and the values of its
// parameters move over from where they were; an old bucket goes once the last of its parameters has
// left.
//
// What a checkpoint holds of a parameter lies in its slot until its bucket comes.
//
// What stays is the slot: the place of a parameter in the list that all ranks have agreed on, with
// its name. Another model's parameters take over the slots of the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "config.h"
#include "state/bucket_state.h"

namespace arc_topk {

using Parameters = std::vector<at::Tensor>;

// What ranks compare before they go on together, a parameter each.
struct Standing {
  std::vector<uint64_t> exchanges;
  std::vector<bool> started;
};

// Error feedback of one parameter, outside of any bucket: copies of the parameter's shape, on the
// CPU. Undefined: it has no such part.
struct Kept {
  at::Tensor own_a, own_b, shared;
  at::Tensor basis;  // low rank's W^T, [k, n]; of the matrix that it was, whatever that will be
  bool started = false;
};

class StateStore {
 public:
  StateStore(Config config, int world_size);

  // Throws std::invalid_argument, naming the parameter, where bind() could not keep what is there.
  void check_bind(const Parameters& parameters, const std::vector<std::string>& names) const;
  // These parameters are the slots from now on, in this order. State is taken over by name; from
  // parameters that had none, by identity. Other parameters are refused from now on.
  // `may_be_unused`: DDP gives a parameter that no rank used a gradient of zeros and throws away
  // what becomes of it: no state may go with it. Else zeros are a gradient like any other. (Before
  // anybody has bound the state it is true: nothing is lost by it.) `ratios`: one each; none: the
  // configuration's.
  void bind(const Parameters& parameters, const std::vector<std::string>& names, bool may_be_unused,
            const std::vector<double>& ratios = {});

  Standing standing() const;
  uint64_t compressed() const;  // steps, of the bucket with most
  // All buckets go on as step `exchanges`; `afresh`: EF21 and EF21M with a dense first step again.
  void resume(uint64_t exchanges, bool afresh);

  // A slot each, in the order of bind(): its name, and its error feedback if it has any. Nothing of
  // it may be in the air.
  std::vector<std::pair<std::string, std::optional<Kept>>> snapshot() const;
  // Takes back what snapshot() gave, of as many slots: all buckets go, each told to `leaving`
  // before, and those that come next are step `exchanges`, the `compressed`th compressed one.
  void restore(std::vector<std::optional<Kept>> kept, uint64_t exchanges, uint64_t compressed,
               const std::function<void(BucketState&)>& leaving);

  // The bucket of these parameters as they lie in `buffer`; null: unknown, make() it.
  BucketState* find(const Parameters& parameters, const at::Tensor& buffer) const;
  // Whether its next step is of another stage of the warm-up: make() it anew.
  bool outgrown(const BucketState& bucket) const;
  // Whether making it takes state away from a bucket that is in the air, which must end before.
  bool takes_from_busy(const Parameters& parameters) const;
  // Throws std::invalid_argument before anything is touched. Buckets that are left empty go, each
  // told to `leaving` before.
  BucketState& make(const Parameters& parameters, const at::Tensor& buffer,
                    const std::function<void(BucketState&)>& leaving);

  // Multiplies all error feedback.
  void rescale(double factor);

  // What device kernels have added up so far: no step of theirs is waited for by the host, so it
  // is read only when asked for. From any thread.
  Energy device_energy() const;
  void reset_device_energy();

  int64_t max_cols() const { return max_cols_; }  // the widest compressed matrix seen so far

 private:
  struct Slot {
    std::string name;
    // Not the tensor itself: state must not keep a model alive. Its address is not used again while
    // somebody remembers it so.
    c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
    std::optional<double> ratio{};  // none: the configuration's
    BucketState* bucket = nullptr;  // null: has no state yet
    size_t index = 0;               // which of the bucket's tensors
    std::optional<Kept> kept{};     // restored, until a bucket takes it over

    // A basis alone is none: without it low rank begins with another, and nothing is lost.
    bool has_state() const {
      return bucket != nullptr || (kept && (kept->own_a.defined() || kept->shared.defined()));
    }
    at::IntArrayRef sizes() const;  // of its state
    bool has_residual() const;
  };
  struct Owned {
    std::unique_ptr<BucketState> state;
    std::vector<const c10::TensorImpl*> tensors;
    int64_t tenants = 0;   // slots whose values are here
    bool retired = false;  // known no more, but by the values that lie in it
  };

  const Slot* slot_of(const at::Tensor& parameter) const;
  size_t slot_for(const at::Tensor& parameter);
  std::vector<Slot> rebound(const Parameters& parameters,
                            const std::vector<std::string>& names) const;
  void check(const Parameters& parameters, const std::vector<Layout>& layouts,
             const at::Tensor& buffer) const;
  // Brings the values of a slot to where they are from now on. Whether h is the mean of the h_i.
  bool move(const Slot& slot, BucketState& to, size_t index) const;
  Kept copy_of(const Slot& slot) const;
  void leave(const Slot& slot, BucketState& successor,
             const std::function<void(BucketState&)>& leaving);

  const Config config_;
  const Compressor& compressor_;
  const int world_size_;
  int64_t max_cols_ = 0;
  bool bound_ = false;
  bool may_be_unused_ = true;
  uint64_t first_exchange_ = 0;    // of buckets without history
  uint64_t first_compressed_ = 0;  // likewise
  std::vector<Slot> slots_;
  std::unordered_map<const c10::TensorImpl*, size_t> places_;  // of the slots' tensors
  mutable std::mutex mutex_;                                   // of the list of buckets
  std::unordered_map<const BucketState*, Owned> buckets_;
};

}  // namespace arc_topk
