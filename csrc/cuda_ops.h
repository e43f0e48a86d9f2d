// The three functions of the contract on CUDA tensors: everything between torch and the launchers of
// csrc/cuda.
//
// No CUDA headers: the caller names the stream, so that this compiles, and is tested, wherever torch is.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "contract.h"

namespace arl::cuda {

// As arl::forward (ops.h). `stream` is a cudaStream_t of the logits' device. `ticket` is a zeroed int32 of
// that stream, or nothing: then each call zeroes one of its own, which is right in every situation and costs
// a memset.
Results forward(const std::vector<at::Tensor>& logits, const Targets& targets, const Schedule& schedule,
                const Options& options, bool grad, int64_t stream, const std::optional<at::Tensor>& ticket);

// One launch for all branches. With `reuse` in place where the dtype allows; it ends at once where the factor
// is 1.
std::vector<at::Tensor> scale(const std::vector<at::Tensor>& grads, const at::Tensor& upstream,
                              const std::optional<at::Tensor>& factor, at::ScalarType dtype, bool reuse,
                              int64_t stream);

// One launch for all modalities.
std::vector<at::Tensor> modulate_backward(const std::vector<at::Tensor>& grads, const at::Tensor& link,
                                          const std::vector<int64_t>& modality, int64_t stream);

// Adds cuda_forward, cuda_scale and cuda_modulate_backward, the functions above, to a Python module.
void define(pybind11::module_& module);

}  // namespace arl::cuda
