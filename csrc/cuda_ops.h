// The three functions of the contract on CUDA tensors: everything between torch and the launchers of
// csrc/cuda.
//
// No CUDA headers: this compiles wherever torch is. With ARL_FAST_CUDA_ON_CPU it serves tensors of the CPU,
// for launchers that run there: the emulation in tests/emulation and the stubs in benchmarks/native_host.py.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "contract.h"

namespace arl::cuda {

#if defined(ARL_FAST_CUDA) || defined(ARL_FAST_CUDA_ON_CPU)
inline constexpr bool kBuilt = true;
#else
inline constexpr bool kBuilt = false;
#endif

// Whether the launchers serve a tensor.
inline bool serves(const at::Tensor& tensor) {
#if defined(ARL_FAST_CUDA_ON_CPU)
  return tensor.is_cpu();
#else
  return kBuilt && tensor.is_cuda();
#endif
}

// Whether results share an allocation, which saves host time, or have their own, as those of a registered op
// must.
enum class Memory { kShared, kOwn };

// As arl::forward (ops.h), on the current stream of the logits' device.
Results forward(at::TensorList logits, const Targets& targets, const Schedule& schedule,
                const Options& options, bool grad, Memory memory);

// One launch for all branches, of contiguous gradients of any shape for a scalar upstream. With `reuse` in place where the dtype allows; it ends at once where the factor
// is 1.
std::vector<at::Tensor> scale(at::TensorList grads, const at::Tensor& upstream,
                              const std::optional<at::Tensor>& factor, at::ScalarType dtype, bool reuse);

// One launch for up to 16 modalities. Where `reuse` says so a result takes the place of its gradient.
std::vector<at::Tensor> modulate_backward(at::TensorList grads, at::IntArrayRef modalities,
                                          const at::Tensor& link, at::ArrayRef<char> reuse = {});

// Whether the current stream of a tensor's device is being captured in a graph.
bool is_capturing(const at::Tensor& tensor);

// Adds cuda_forward, cuda_scale and cuda_modulate_backward, the functions above, to a Python module.
void define(pybind11::module_& module);

}  // namespace arl::cuda
