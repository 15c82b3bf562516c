// From configuration and shapes to the layout of a bucket. It follows from these and the world size
// alone, so it is the same on every rank and nothing ever waits to learn a size.
#pragma once

#include <vector>

#include "compress/compressor.h"
#include "plan/plan.h"

namespace arc_topk {

Types types_for(const Config& config, const Compressor& compressor, DType gradient, int world_size);

Matrix view_as_matrix(const Config& config, const Compressor& compressor, const Shape& shape,
                      const Types& types, int world_size);

// K = ceil(ratio * m), at least 1.
int64_t kept_rows(double ratio, int64_t rows);

// Steps from one resync of the shared estimate h to the next; 0: none is ever needed, or wanted.
int64_t resync_every(const Config& config, const Compressor& compressor, const Types& types,
                     int world_size);

Plan make_plan(const Config& config, const Compressor& compressor, DType gradient,
               const std::vector<Shape>& shapes, int world_size);

}  // namespace arc_topk
