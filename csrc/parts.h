// Tensors that share an allocation.
#pragma once

#include <ATen/ATen.h>

namespace arl {

// A dense tensor that is a part of another's memory, from an element on, with a version counter of its own.
inline at::Tensor part_of(const at::Tensor& memory, int64_t first, at::IntArrayRef sizes) {
  auto part = at::detail::make_tensor<at::TensorImpl>(c10::Storage(memory.storage()), memory.key_set(),
                                                      memory.dtype());
  part.unsafeGetTensorImpl()->set_storage_offset(memory.storage_offset() + first);
  part.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return part;
}

}  // namespace arl
