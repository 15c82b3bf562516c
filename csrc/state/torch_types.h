// torch's types and layouts in the engine's words.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include "plan/plan.h"

namespace arc_topk {

DType dtype_of(at::ScalarType type);      // throws where the engine has no such type
DType wire_type_of(at::ScalarType type);  // kByte besides
at::ScalarType scalar_type_of(DType type);
// The memory view of a parameter: rows are its slowest-varying dimension.
Shape shape_of(at::IntArrayRef sizes, at::IntArrayRef strides);

// How the gradient of a parameter lies in a bucket's buffer.
struct Layout {
  at::DimVector sizes;
  at::DimVector strides;
  bool operator==(const Layout& other) const {
    return sizes == other.sizes && strides == other.strides;
  }
};

// DDP lays a gradient out with the strides that its parameter had when the buckets were made, which
// need not be today's. Where the gradient is a view of the buffer it tells them itself.
Layout layout_in(const at::Tensor& buffer, const at::Tensor& parameter);
// layout == layout_in(buffer, parameter), without making one.
bool lies_as(const Layout& layout, const at::Tensor& buffer, const at::Tensor& parameter);

}  // namespace arc_topk
