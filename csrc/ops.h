// The three functions of the contract (docs/architecture.md) on CPU tensors, for the registered ops and for
// Python.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "contract.h"

namespace arl {

Results forward(at::TensorList logits, const Targets& targets, const Schedule& schedule,
                const Options& options, bool grad);

// grads * upstream * factor, rounded once to `dtype`. With `reuse` the result may be `grads`, scaled in
// place.
std::vector<at::Tensor> scale(at::TensorList grads, const at::Tensor& upstream,
                              const std::optional<at::Tensor>& factor, at::ScalarType dtype, bool reuse);

// grads[i] * (1 + link[modalities[i]]) (Eq. 19, with link = gain - 1).
std::vector<at::Tensor> modulate_backward(at::TensorList grads, at::IntArrayRef modalities,
                                          const at::Tensor& link);

}  // namespace arl
