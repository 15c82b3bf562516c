#include "state/torch_types.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace arc_topk {

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kF32;
    case at::kDouble:
      return DType::kF64;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      throw std::invalid_argument(std::string("arc_topk: a gradient has dtype ") +
                                  c10::toString(type) +
                                  "; expected Float, Double, BFloat16 or Half");
  }
}

DType wire_type_of(at::ScalarType type) { return type == at::kByte ? DType::kU8 : dtype_of(type); }

at::ScalarType scalar_type_of(DType type) {
  switch (type) {
    case DType::kF32:
      return at::kFloat;
    case DType::kF64:
      return at::kDouble;
    case DType::kBF16:
      return at::kBFloat16;
    case DType::kF16:
      return at::kHalf;
    case DType::kU8:
      return at::kByte;
  }
  throw std::invalid_argument("unknown DType");
}

Shape shape_of(at::IntArrayRef sizes, at::IntArrayRef strides) {
  Shape shape{1, static_cast<int64_t>(sizes.size()), 1, 0};
  int64_t slowest = -1;
  for (size_t d = 0; d < sizes.size(); ++d) {
    shape.numel *= sizes[d];
    if (strides[d] > slowest) {
      slowest = strides[d];
      shape.rows = sizes[d];
    }
  }
  return shape;
}

namespace {

const at::Tensor& teller(const at::Tensor& buffer, const at::Tensor& parameter) {
  const at::Tensor& gradient = parameter.grad();
  const bool tells = gradient.defined() && gradient.layout() == at::kStrided &&
                     gradient.strides() != parameter.strides() &&
                     gradient.storage().is_alias_of(buffer.storage());
  return tells ? gradient : parameter;
}

}  // namespace

Layout layout_in(const at::Tensor& buffer, const at::Tensor& parameter) {
  const at::Tensor& told = teller(buffer, parameter);
  Layout layout{at::DimVector(told.sizes()), at::DimVector(told.strides())};
  if (told.is_non_overlapping_and_dense()) return layout;
  // Of a parameter with gaps DDP makes a gradient without.
  int64_t stride = 1;
  for (size_t d = layout.sizes.size(); d-- > 0;) {
    layout.strides[d] = stride;
    stride *= std::max<int64_t>(1, layout.sizes[d]);
  }
  return layout;
}

bool lies_as(const Layout& layout, const at::Tensor& buffer, const at::Tensor& parameter) {
  const at::Tensor& told = teller(buffer, parameter);
  if (told.sizes() != at::IntArrayRef(layout.sizes)) return false;
  if (told.strides() == at::IntArrayRef(layout.strides)) return true;
  return !told.is_non_overlapping_and_dense() && layout_in(buffer, parameter) == layout;
}

}  // namespace arc_topk
