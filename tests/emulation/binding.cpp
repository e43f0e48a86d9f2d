// csrc/cuda_ops.cpp as a Python module of its own, to be linked with the emulated launchers: the binding on CPU tensors.
#include "../../csrc/cuda_ops.h"

PYBIND11_MODULE(arl_cuda_binding, module) {
  pybind11::class_<arl::Options>(module, "Options", pybind11::module_local())
      .def(pybind11::init([](int rule, int dependence, double entropy_floor, int gain, int64_t ignore_index,
                             double label_smoothing, int reduction) {
        return arl::Options{rule, dependence, gain, reduction, entropy_floor, label_smoothing, ignore_index};
      }));
  arl::cuda::define(module);
}
