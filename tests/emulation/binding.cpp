// csrc/cuda_ops.cpp as a Python module of its own, to be linked with the emulated launchers: the binding on
// CPU tensors.
#include "../../csrc/cuda_ops.h"

PYBIND11_MODULE(arl_cuda_binding, module) { arl::cuda::define(module); }
