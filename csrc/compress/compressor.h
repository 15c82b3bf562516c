// A compressor: how a matrix is cut down, and the order of kernels and collectives that does it.
// One file each beside this one; compressors() lists them. None knows tensors, threads, DDP or a
// device.
#pragma once

#include <string>
#include <vector>

#include "plan/plan.h"

namespace arc_topk {

enum class Phase : uint8_t {
  kPrepare,
  kResync,
  kFirstCollective,
  kSelect,
  kPack,
  kSecondCollective,
  kApply,
  kCheck
};
constexpr int kNumPhases = 8;
const char* name_of(Phase phase);

// One bucket on its way through one step: what a compressor may do with it.
class Step {
 public:
  virtual ~Step() = default;

  virtual const Plan& plan() const = 0;
  virtual const Bucket& bucket() const = 0;
  virtual const Kernels& kernels() const = 0;
  virtual uint64_t seed() const = 0;
  virtual uint64_t number() const = 0;  // the step's, from 0; picks V and Rand-K's draw
  virtual Projection projection() = 0;  // V of this step

  // Sums in place over all ranks.
  virtual void all_reduce_first(Phase phase) = 0;
  virtual void all_reduce_second(Phase phase) = 0;
  // The bucket's own buffer, divided by N beforehand, as DDP does it.
  virtual void average_gradient(Phase phase) = 0;
  // Top-K's messages of all ranks, one after the other.
  virtual void all_gather_message(Phase phase) = 0;
  virtual Gathered gathered() const = 0;

  // Marks what the step is doing: for timings, profilers, and the text of errors.
  virtual void enter(Phase phase) = 0;
};

class Compressor {
 public:
  virtual ~Compressor() = default;
  virtual const char* name() const = 0;

  // --- plan ---
  virtual bool compresses() const { return true; }
  virtual bool by_element() const { return false; }  // keeps single elements whatever the row width
  // A matrix travels as two factors of few columns, rather than by some of its rows.
  virtual bool factorises() const { return false; }
  // K of a matrix of which all but what follows from it is known: rows, or columns of factors.
  virtual int64_t kept(const Matrix& matrix, const Types& types, const Config& config) const;
  // Memory that it keeps of a compressed matrix beside the error feedback's own.
  virtual int64_t factor_bytes(const Matrix&, const Types&) const { return 0; }
  // Bytes a rank hands to the collectives for one compressed matrix, its flag included.
  virtual int64_t wire_bytes(const Matrix& matrix, const Types& types,
                             const Config& config) const = 0;
  // Link traffic of a byte handed over, against a byte handed to an all-reduce (ring algorithms).
  virtual double link_cost(int /*world_size*/) const { return 1; }
  // What a dense tensor rides in, within a bucket of this compressor.
  virtual DType dense_type(const Types& types) const;
  // Sets every offset and size of the payloads.
  virtual void lay_out(Plan& plan, const Config& config) const = 0;
  // Selects rows by a sketch.
  virtual bool sketches() const { return false; }
  // One message of bytes to gather, rather than payloads to reduce.
  virtual bool gathers() const { return false; }

  // --- step: in this order, each in the bucket's turn ---
  // Before it communicates: reads the gradient, fills the first payload.
  virtual void prepare(Step& step) const = 0;
  // The first collective, and what leads to the second.
  virtual void first(Step& step) const = 0;
  // The second, where there is one; nothing else.
  virtual bool has_second() const { return false; }
  virtual void second(Step&) const {}
  // Behind all collectives.
  virtual void last(Step& step) const = 0;

  // --- between steps ---
  // What a scaler's skipped step has sent, back into the residual: Kernels::reclaim().
  virtual void reclaim(Step& step) const;
  // Own state becomes what it stands for, where the compressor keeps a part of it elsewhere.
  virtual void settle(Step&) const {}
};

const Compressor& dense();
const Compressor& arc_top_k();
const Compressor& rand_k();
const Compressor& top_k();
const Compressor& low_rank();
// By its name in Config; throws std::invalid_argument that lists the names.
const Compressor& compressor_named(const std::string& name);

}  // namespace arc_topk
