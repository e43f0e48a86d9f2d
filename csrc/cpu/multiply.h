// Matrix products on the CPU.
#pragma once

#include <ATen/ATen.h>

namespace arl::cpu {

// out = factor a b, or += unless `first`; all 2-D and of one dtype, any strides.
void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double factor, bool first);

}  // namespace arl::cpu
