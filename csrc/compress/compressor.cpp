#include "compress/compressor.h"

#include <stdexcept>

#include "compress/make_plan.h"

namespace arc_topk {

const char* name_of(Phase phase) {
  switch (phase) {
    case Phase::kPrepare:
      return "prepare";
    case Phase::kResync:
      return "resync";
    case Phase::kFirstCollective:
      return "first_collective";
    case Phase::kSelect:
      return "select";
    case Phase::kPack:
      return "pack";
    case Phase::kSecondCollective:
      return "second_collective";
    case Phase::kApply:
      return "apply";
    case Phase::kCheck:
      return "check";
  }
  return "?";
}

// What is narrower than the gradient rounds, and a dense tensor has no state to feed that back
// from: it rides in the gradient's own type where a payload has that type, else as the sketches do,
// unless these are narrowed below the wire.
DType Compressor::dense_type(const Types& types) const {
  if (types.wire == types.gradient) return types.gradient;
  const bool narrowed = types.sketch != types.work() && types.sketch != types.gradient;
  return narrowed && size_of(types.wire) > size_of(types.sketch) ? types.wire : types.sketch;
}

int64_t Compressor::kept(const Matrix& matrix, const Types&, const Config&) const {
  return kept_rows(matrix.ratio, matrix.rows);
}

void Compressor::reclaim(Step& step) const { step.kernels().reclaim(step.bucket()); }

const Compressor& compressor_named(const std::string& name) {
  for (const Compressor* compressor : {&arc_top_k(), &dense(), &low_rank(), &rand_k(), &top_k()}) {
    if (name == compressor->name()) return *compressor;
  }
  throw std::invalid_argument("compressor is '" + name +
                              "'; expected 'arc_topk', 'dense', 'low_rank', 'rand_k' or 'top_k'");
}

}  // namespace arc_topk
