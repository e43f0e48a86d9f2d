#include "eager.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstring>
#include <unordered_map>

namespace arl {
namespace {

using c10::DispatchKey;

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) { return (keys.raw_repr() & ~allowed.raw_repr()) == 0; }

// A number from a Python number or a 0-d tensor that needs no gradient.
bool number(PyObject* object, double* value) {
  if (PyFloat_Check(object)) {
    *value = PyFloat_AS_DOUBLE(object);
  } else if (PyLong_Check(object)) {
    *value = PyLong_AsDouble(object);
    if (*value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
  } else {
    const at::Tensor* tensor = plain(object);
    if (tensor == nullptr || tensor->dim() != 0 || tensor->requires_grad()) return false;
    switch (tensor->scalar_type()) {
      case at::kFloat:
        *value = *tensor->const_data_ptr<float>();
        break;
      case at::kDouble:
        *value = *tensor->const_data_ptr<double>();
        break;
      case at::kLong:
        *value = double(*tensor->const_data_ptr<int64_t>());
        break;
      case at::kBool:
        *value = *tensor->const_data_ptr<bool>();
        break;
      default:
        return false;
    }
  }
  return std::isfinite(*value);
}

// The fields of options.Options; false for a callable rule.
bool read_options(PyObject* object, Options* options) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 7) return false;
  PyObject* floor = PyTuple_GET_ITEM(object, 2);
  options->rule = position(PyTuple_GET_ITEM(object, 0), {"share", "paper", "constant", "none"});
  options->dependence = position(PyTuple_GET_ITEM(object, 1), {"confidence", "logit_l1"});
  options->entropy_floor = -1;
  options->gain = position(PyTuple_GET_ITEM(object, 3), {"residual", "mean_one", "plain"});
  options->ignore_index = PyLong_AsLongLong(PyTuple_GET_ITEM(object, 4));
  options->reduction = position(PyTuple_GET_ITEM(object, 6), {"mean", "sum", "none"});
  const bool read = !PyErr_Occurred() && number(PyTuple_GET_ITEM(object, 5), &options->label_smoothing) &&
                    (floor == Py_None || number(floor, &options->entropy_floor));
  PyErr_Clear();
  return read && options->rule >= 0 && options->dependence >= 0 && options->gain >= 0 && options->reduction >= 0;
}

}  // namespace

bool nobody_watches() {
  constexpr c10::DispatchKeySet harmless({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU,
                                          DispatchKey::AutocastCUDA});
  constexpr c10::DispatchKeySet autograd(DispatchKey::AutogradFunctionality);
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return within(keys.included_, harmless) && !keys.excluded_.has_any(autograd) && !at::impl::torch_function_mode_enabled() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

const at::Tensor* plain(PyObject* object) {
  constexpr c10::DispatchKeySet usual(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU});
  if (!THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return within(tensor.key_set(), usual) && tensor.is_cpu() ? &tensor : nullptr;
}

bool is_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

int position(PyObject* text, std::initializer_list<const char*> names) {
  const char* own = PyUnicode_Check(text) ? PyUnicode_AsUTF8(text) : nullptr;
  int i = 0;
  for (const char* name : names) {
    if (own != nullptr && std::strcmp(own, name) == 0) return i;
    ++i;
  }
  return -1;
}

// Options objects live as long as a run, so they are read once; the reference held keeps an address from being reused.
const Options* options_of(PyObject* object) {
  static auto* known = new std::unordered_map<PyObject*, Options>;
  const auto found = known->find(object);
  if (found != known->end()) return &found->second;
  Options options;
  if (!read_options(object, &options)) return nullptr;
  if (known->size() >= 64) {
    for (auto& [held, _] : *known) Py_DECREF(held);
    known->clear();
  }
  Py_INCREF(object);
  return &known->emplace(object, options).first->second;
}

c10::SmallVector<PyObject*, 8> values_of(PyObject* unimodal) {
  c10::SmallVector<PyObject*, 8> values;
  if (PyDict_CheckExact(unimodal)) {
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(unimodal, &at, &name, &value);) values.push_back(value);
  } else if (PyList_CheckExact(unimodal) || PyTuple_CheckExact(unimodal)) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(unimodal);
    for (Py_ssize_t i = 0; i < count; ++i) values.push_back(PySequence_Fast_GET_ITEM(unimodal, i));
  }
  return values;
}

bool read_inputs(PyObject* target_object, PyObject* const* rest, const Options& options, int64_t rows, int64_t classes,
                 int64_t modalities, at::ScalarType type, cpu::Inputs* inputs) {
  double warming;
  if (!number(rest[2], &inputs->gamma) || !number(rest[3], &inputs->temperature) || !number(rest[4], &warming)) return false;
  if (inputs->gamma < 0 || PyBool_Check(rest[2]) || PyBool_Check(rest[3])) return false;
  inputs->warming = warming != 0;
  if (options.reduction == kNoReduction || (options.rule == kPaper && modalities != 2)) return false;
  if (!is_float(type) || classes == 0 || modalities == 0 || modalities >= cpu::kMaxBranches) return false;

  const at::Tensor* target = inputs->target = plain(target_object);
  if (target == nullptr || (target->scalar_type() != at::kLong && target->scalar_type() != at::kInt) || target->dim() != 1 ||
      target->size(0) != rows || !target->is_contiguous()) {
    return false;
  }
  if (rest[0] != Py_None) {
    const at::Tensor* mask = inputs->mask = plain(rest[0]);
    if (mask == nullptr || mask->scalar_type() != at::kBool || mask->dim() != 2 || mask->size(0) != rows || mask->size(1) != modalities) {
      return false;
    }
  }
  if (rest[1] != Py_None) {
    const at::Tensor* weight = inputs->weight = plain(rest[1]);
    const at::ScalarType compute = type == at::kDouble ? at::kDouble : at::kFloat;
    if (weight == nullptr || weight->scalar_type() != compute || weight->dim() != 1 || weight->size(0) != classes ||
        !weight->is_contiguous() || weight->requires_grad()) {
      return false;
    }
  }
  return true;
}

// ---- for autograd nodes --------------------------------------------------------------------------------------------

double value_at(const at::Tensor& packed, int64_t position) {
  return packed.scalar_type() == at::kDouble ? packed.const_data_ptr<double>()[position] : packed.const_data_ptr<float>()[position];
}

c10::SmallVector<double, 4> link_gradient(const at::Tensor& packed, int modalities) {
  c10::SmallVector<double, 4> gradient;
  for (int m = 0; m < modalities; ++m) gradient.push_back(value_at(packed, link_offset(modalities) + m));
  return gradient;
}

double read_scalar(const at::Tensor& tensor) {
  if (tensor.is_cpu() && tensor.scalar_type() == at::kFloat) return *tensor.const_data_ptr<float>();
  return tensor.item<double>();
}

void refuse_second_derivatives() {
  TORCH_CHECK(!at::GradMode::is_enabled(),  // the same words as in functional.py
              "arl_loss: got a backward with create_graph=True, but its gradients are computed in the forward pass and have no "
              "derivatives of their own; use torch.nn.functional.cross_entropy on the branches where second derivatives are needed");
}

PyObject* pair(PyObject* first, PyObject* second) {
  PyObject* both = first == nullptr || second == nullptr ? nullptr : PyTuple_New(2);
  if (both == nullptr) {
    Py_XDECREF(first);
    Py_XDECREF(second);
    return nullptr;
  }
  PyTuple_SET_ITEM(both, 0, first);
  PyTuple_SET_ITEM(both, 1, second);
  return both;
}

}  // namespace arl
