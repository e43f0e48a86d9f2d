// The Python module arl_fast._C. Importing it also registers the kernels of ops.cpp with torch.
#include <torch/csrc/utils/pybind.h>
#include <torch/headeronly/version.h>

#include "cpu/forward.h"
#include "cpu/memory.h"
#include "cuda_ops.h"
#include "eager/inputs.h"
#include "eager/steps.h"
#include "ops.h"
#include "spec.h"

namespace {

using Tensors = std::vector<at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;
using pybind11::handle;

arl::Results forward(const Tensors& logits, handle targets, handle schedule, handle options, bool grad) {
  const arl::Arguments arguments(targets.ptr(), schedule.ptr(), options.ptr());
  const pybind11::gil_scoped_release release;
  return arl::forward(logits, arguments.targets, arguments.schedule, arguments.options, grad);
}

Tensors scale(const Tensors& grads, const at::Tensor& upstream, const MaybeTensor& factor,
              at::ScalarType dtype, bool keep) {
  const pybind11::gil_scoped_release release;
  return arl::scale(grads, upstream, factor, dtype, !keep);
}

Tensors modulate_backward(const Tensors& grads, const std::vector<int64_t>& modalities,
                          const at::Tensor& link) {
  const pybind11::gil_scoped_release release;
  return arl::modulate_backward(grads, modalities, link);
}

// CPython calls these directly: pybind11 would cost as much as their own checks.
using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyCFunction as_method(FastCall function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef fast_methods[] = {
    {"fast_loss", as_method(&arl::fast_loss), METH_FASTCALL, nullptr},
    {"fast_criterion", as_method(&arl::fast_criterion), METH_FASTCALL, nullptr},
    {"fast_linear_loss", as_method(&arl::fast_linear_loss), METH_FASTCALL, nullptr},
    {"fast_modulate", &arl::fast_modulate, METH_O, nullptr},
    {"fast_unpack", &arl::fast_unpack, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of arl_fast; arl_fast/implementations/native.py is their interface.";
  module.attr("spec") = arl::spec();
  module.attr("torch") = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
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
