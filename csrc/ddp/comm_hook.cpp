#include "ddp/comm_hook.h"

#include <stdexcept>

namespace arc_topk {

c10::intrusive_ptr<c10::ivalue::Future> exchange_bucket(Exchange& exchange,
                                                        c10d::GradBucket& bucket,
                                                        bool result_in_buffer) {
  const at::Tensor& buffer = bucket.getBuffer();
  if (buffer.is_sparse() || bucket.getSparseGradIndices().has_value()) {
    throw std::invalid_argument(
        "arc_topk: a gradient is sparse; expected dense gradients (sparse=False in the embedding)");
  }
  if (buffer.is_complex()) {
    throw std::invalid_argument(
        "arc_topk: a gradient is complex; expected real gradients (torch.view_as_real the "
        "parameter)");
  }
  // Slicing the buffer by the parameters' own sizes, in order, is right for every memory format;
  // getGradients() is not.
  return exchange.start(buffer, bucket.getParameters(), static_cast<int64_t>(bucket.getIndex()),
                        result_in_buffer);
}

at::Tensor averaged(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor();
  return value.toTensorVector().at(0);  // a process group's own future: plain averaging
}

}  // namespace arc_topk
