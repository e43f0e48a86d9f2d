// The entry points from Python that serve a usual eager step, each with its autograd node, in one call: on a
// CPU and, but for the linear head, with CUDA.
//
// Each returns None if anything about the call is unusual or wrong. The general path (arl_fast/_autograd)
// then serves or diagnoses the call.
#pragma once

#include <Python.h>

namespace arl {

// The fields of the NamedTuples that are read here.
inline constexpr const char* kBranchLogitsFields[] = {"fused", "unimodal", "link"};
inline constexpr const char* kLinearHeadFields[] = {"features", "weights",   "bias",
                                                    "fusion",   "bias_mode", "chunk"};

// -> (loss, packed)
inline constexpr const char* kFastLoss[] = {"options", "branches", "targets", "schedule"};
PyObject* fast_loss(PyObject* module, PyObject* const* args, Py_ssize_t count);

// -> the loss of an ARLLoss, in whose attributes the call leaves what its forward does.
inline constexpr const char* kFastCriterion[] = {"criterion", "output", "target", "mask"};
PyObject* fast_criterion(PyObject* module, PyObject* const* args, Py_ssize_t count);

// -> (loss, packed), if all rows are one chunk; `budget` in bytes holds where the head names no chunk.
inline constexpr const char* kFastLinearLoss[] = {"options", "head", "targets", "schedule", "budget"};
PyObject* fast_linear_loss(PyObject* module, PyObject* const* args, Py_ssize_t count);

// -> (features, link) for a list of tensors
inline constexpr const char* kFastModulate[] = {"features"};
PyObject* fast_modulate(PyObject* module, PyObject* features);

// -> the parts of a packed vector that are BranchStats, in their order, which share its memory
inline constexpr const char* kFastUnpack[] = {"packed"};
PyObject* fast_unpack(PyObject* module, PyObject* packed);

}  // namespace arl
