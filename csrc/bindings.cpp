// The Python module arl_fast._C. Importing it also registers the ops of ops.cpp with torch.
#include <torch/csrc/utils/pybind.h>

#include "autograd.h"
#include "cpu/forward.h"
#include "cpu/memory.h"
#include "cuda_ops.h"
#include "eager.h"
#include "ops.h"

namespace {

using Tensors = std::vector<at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

arl::Options options_from(int rule, int dependence, double entropy_floor, int gain, int64_t ignore_index, double label_smoothing,
                          int reduction) {
  return {rule, dependence, gain, reduction, entropy_floor, label_smoothing, ignore_index};
}

auto forward(const Tensors& logits, const at::Tensor& target, const MaybeTensor& mask, const MaybeTensor& weight,
             const MaybeTensor& norm, const MaybeTensor& schedule, double gamma, double temperature, bool warming,
             const arl::Options& options, bool grad) {
  pybind11::gil_scoped_release release;
  return arl::forward(logits, target, mask, weight, norm, schedule, gamma, temperature, warming, options, grad);
}

auto scale(const Tensors& grads, const at::Tensor& upstream, const MaybeTensor& factor, at::ScalarType dtype, bool reuse) {
  pybind11::gil_scoped_release release;
  return arl::scale(grads, upstream, factor, dtype, reuse);
}

auto modulate_backward(const Tensors& grads, const at::Tensor& link, const std::vector<int64_t>& modality) {
  pybind11::gil_scoped_release release;
  return arl::modulate_backward(grads, link, modality);
}

// Called with as little in between as CPython allows: pybind11 would cost as much as their own checks.
PyMethodDef fast_methods[] = {
    {"fast_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&arl::fast_loss)), METH_FASTCALL, nullptr},
    {"fast_linear_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&arl::fast_linear_loss)), METH_FASTCALL, nullptr},
    {"fast_modulate", &arl::fast_modulate, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("interface") = 2;  // INTERFACE in native.py: raise both whenever what Python calls changes
  module.doc() = "Native kernels of arl_fast; arl_fast/kernels/native.py is their interface.";
  pybind11::class_<arl::Options>(module, "Options").def(pybind11::init(&options_from));
  module.def("forward", &forward);
  module.def("scale", &scale);
  module.def("modulate_backward", &modulate_backward);
#ifdef ARL_FAST_CUDA
  arl::cuda::define(module);
#endif
  module.def("available_isas", &arl::cpu::available_isas);
  module.def("isa", &arl::cpu::isa);
  module.def("set_isa", &arl::cpu::set_isa);
  module.def("kept_memory", &arl::cpu::kept_memory);
  module.def("release_memory", &arl::cpu::release_memory);
  if (PyModule_AddFunctions(module.ptr(), fast_methods) != 0) throw pybind11::error_already_set();
}
