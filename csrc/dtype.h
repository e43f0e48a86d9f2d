// From torch's types to those of finish.h.
#pragma once

#include <ATen/ATen.h>

#include "finish.h"

namespace arl {

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return kFloat64;
    case at::kFloat: return kFloat32;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "arl_fast: got dtype ", type,
                       ", expected float64, float32, bfloat16 or float16");
  }
}

}  // namespace arl
