// Error-feedback state by parameter, in arenas that lie in bucket order.
//
// DDP rebuilds its buckets after the first backward: other parameters side by side, in another
// order. A bucket is therefore known by its list of parameters, never by its index. When an unknown
// list comes, a bucket is made for it and the values of its parameters move over from where they
// were; an old bucket goes once the last of its parameters has left.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "compress/compressor.h"
#include "config.h"
#include "exchange/backend.h"
#include "exchange/plan.h"

namespace arc_topk {

DType dtype_of(at::ScalarType type);  // throws where the engine has no such type
at::ScalarType scalar_type_of(DType type);
// The memory view of a parameter: rows are its slowest-varying dimension.
Shape shape_of(at::IntArrayRef sizes, at::IntArrayRef strides);

// One bucket: its plan, its arenas, and every buffer its exchange needs, allocated once.
struct BucketState {
  std::vector<at::Tensor> parameters;  // the keys; held, so that no address is ever reused
  Plan plan;
  Bucket bucket{};
  Backend backend{};
  std::vector<Piece> pieces;
  const Compressor* compressor = nullptr;

  at::Tensor own_a, own_b, shared;
  // Vectors of one tensor, as collectives want them, so that a step makes none.
  std::vector<at::Tensor> gradient, first, second, message;
  std::vector<std::vector<at::Tensor>> gathered_parts;
  at::Tensor gathered;
  at::Tensor picks, marks, scratch, withheld, is_withheld;
  at::Tensor energy;                      // an Energy, as two doubles
  at::Tensor segment_table, piece_table;  // of a device with a memory of its own

  uint64_t exchanges = 0;   // steps so far: the count of its first parameter
  uint64_t compressed = 0;  // of those, the compressed ones
  bool started = false;     // EF21, EF21M: the dense first step has set h_i and h
  int64_t parameters_here = 0;

  std::unique_ptr<Step> step;  // carries the bucket through its steps; made by the exchange
};

class StateStore {
 public:
  StateStore(Config config, int world_size);
  ~StateStore();

  // The bucket of these parameters, whose gradients lie one after the other in `buffer`.
  BucketState& bucket_for(const std::vector<at::Tensor>& parameters, const at::Tensor& buffer);

  // What device kernels have added up so far: no step of theirs is waited for by the host, so it
  // is read only when asked for.
  Energy device_energy() const;
  void reset_device_energy();

  int64_t max_cols() const { return max_cols_; }  // the widest compressed matrix seen so far

 private:
  struct Place {
    BucketState* bucket;
    int64_t index;  // which of the bucket's tensors
    uint32_t stream;
  };

  BucketState* known(const std::vector<at::Tensor>& parameters) const;
  std::unique_ptr<BucketState> make(const std::vector<at::Tensor>& parameters,
                                    const at::Tensor& buffer);
  void describe(BucketState& bucket) const;
  void move_in(BucketState& bucket);

  const Config config_;
  const Compressor& compressor_;
  const int world_size_;
  int64_t max_cols_ = 0;
  std::unordered_map<const c10::TensorImpl*, Place> places_;
  std::unordered_map<const BucketState*, std::unique_ptr<BucketState>> buckets_;
};

}  // namespace arc_topk
