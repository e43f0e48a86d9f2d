// The three functions of the contract (docs/architecture.md) on tensors, for the registered ops and for Python.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

#include "arl_math.h"

namespace arl {

// `schedule` (gamma, temperature, warming) as a tensor [3] replaces the three numbers. `grads` is empty without `grad`.
std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> forward(
    at::TensorList logits, const at::Tensor& target, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& norm,
    const std::optional<at::Tensor>& schedule, double gamma, double temperature, bool warming, const Options& options,
    bool grad);

// grads * upstream * factor, rounded once to `dtype`. With `reuse` the result may be `grads` themselves, scaled in place.
std::vector<at::Tensor> scale(at::TensorList grads, const at::Tensor& upstream, const std::optional<at::Tensor>& factor,
                              at::ScalarType dtype, bool reuse);

// grads[i] * (1 + link[modality[i]]) (Eq. 19, with link = gain - 1).
std::vector<at::Tensor> modulate_backward(at::TensorList grads, const at::Tensor& link, at::IntArrayRef modality);

}  // namespace arl
