// The eager step on a CPU in C++: one call from Python, and the autograd nodes behind it.
#pragma once

#include <Python.h>

namespace arl {

// fast_loss(options, fused, unimodal, target, link, mask, weight, gamma, temperature, warming) -> (loss, packed), or None
// if anything about the call is unusual or wrong: the general path in functional.py then serves or diagnoses it.
PyObject* fast_loss(PyObject* module, PyObject* const* args, Py_ssize_t count);

// fast_linear_loss(options, fusion, bias_mode, chunk, budget, features, weights, bias, target, mask, weight, gamma, temperature,
// warming) -> (loss, packed) for one chunk of rows (chunk of them, or None and a budget in bytes), or None as above.
PyObject* fast_linear_loss(PyObject* module, PyObject* const* args, Py_ssize_t count);

// fast_modulate(features) -> (features, link) for a list of tensors, or None as above.
PyObject* fast_modulate(PyObject* module, PyObject* features);

}  // namespace arl
