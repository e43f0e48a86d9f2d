// csrc/cuda_ops.cpp and the eager step of csrc/eager as a Python module of its own, to be linked with
// launchers that run on a CPU: it serves CPU tensors as the extension serves those of a GPU.
#include "../../csrc/cuda_ops.h"
#include "../../csrc/eager/steps.h"

namespace {

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyCFunction as_method(FastCall function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef fast_methods[] = {
    {"fast_loss", as_method(&arl::fast_loss), METH_FASTCALL, nullptr},
    {"fast_criterion", as_method(&arl::fast_criterion), METH_FASTCALL, nullptr},
    {"fast_modulate", &arl::fast_modulate, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  arl::cuda::define(module);
  if (PyModule_AddFunctions(module.ptr(), fast_methods) != 0) throw pybind11::error_already_set();
}
