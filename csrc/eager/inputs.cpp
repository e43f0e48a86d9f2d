#include "inputs.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstring>
#include <unordered_map>

#include "../cpu/loss.h"
#include "../cuda/launch.h"
#include "../cuda_ops.h"

namespace arl {
namespace {

using c10::DispatchKey;

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet usual({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                                       DispatchKey::CUDA, DispatchKey::AutogradCUDA,
                                       DispatchKey::AutocastCUDA, DispatchKey::ADInplaceOrView});
  return within(tensor.key_set(), usual) && (tensor.is_cpu() || tensor.is_cuda());
}

// A finite Python number.
bool read_number(PyObject* object, double* value) {
  if (PyFloat_Check(object)) {
    *value = PyFloat_AS_DOUBLE(object);
  } else if (PyLong_Check(object) && !PyBool_Check(object)) {
    *value = PyLong_AsDouble(object);
    if (*value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
  } else {
    return false;
  }
  return std::isfinite(*value);
}

// A tensor, borrowed, or null where the object is something else.
const at::Tensor* as_tensor(PyObject* object, Classes classes) {
  const bool taken = classes == Classes::kAll ? THPVariable_Check(object) : THPVariable_CheckExact(object);
  return taken ? &THPVariable_Unpack(object) : nullptr;
}

bool read_optional(PyObject* object, Classes classes, const at::Tensor** tensor) {
  *tensor = object == Py_None ? nullptr : as_tensor(object, classes);
  return *tensor != nullptr || object == Py_None;
}

bool read_field(const OptionField& field, PyObject* object, Options* options) {
  char* place = reinterpret_cast<char*>(options) + field.offset;
  switch (field.kind) {
    case Kind::kChoice: {
      const int choice = position(object, field.choices, field.choice_count);
      *reinterpret_cast<int*>(place) = choice;
      return choice >= 0;
    }
    case Kind::kNumber: {
      double* number = reinterpret_cast<double*>(place);
      if (object != Py_None) return read_number(object, number);
      *number = field.none;
      return field.optional;
    }
    case Kind::kInteger: {
      const int64_t integer = PyLong_Check(object) ? PyLong_AsLongLong(object) : 0;
      *reinterpret_cast<int64_t*>(place) = integer;
      const bool read = PyLong_Check(object) && !PyErr_Occurred();
      PyErr_Clear();
      return read;
    }
  }
  return false;
}

bool read_options(PyObject* object, Options* options) {
  constexpr Py_ssize_t count = std::size(kOptionFields);
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read_field(kOptionFields[i], PyTuple_GET_ITEM(object, i), options)) return false;
  }
  return true;
}

// Whether a tensor of the schedule, if there is one, is where and what the kernels read.
bool is_usual_number(const at::Tensor* tensor, at::ScalarType type, const at::Tensor& like) {
  if (tensor == nullptr) return true;
  if (!is_plain(*tensor) || tensor->device() != like.device() || tensor->requires_grad()) return false;
  const at::ScalarType own = tensor->scalar_type();
  return own == type || (like.is_cpu() && (own == at::kFloat || own == at::kDouble || own == at::kLong));
}

}  // namespace

// ---- arguments of any call -------------------------------------------------------------------------------

int position(PyObject* text, const char* const* names, int count) {
  const char* own = PyUnicode_Check(text) ? PyUnicode_AsUTF8(text) : nullptr;
  for (int i = 0; i < count && own != nullptr; ++i) {
    if (std::strcmp(own, names[i]) == 0) return i;
  }
  return -1;
}

// Options live as long as a run, so each is read once. The reference held keeps its address from being used
// again.
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

PyObject* const* items_of(PyObject* object, size_t count) {
  const bool fits = PyTuple_Check(object) && size_t(PyTuple_GET_SIZE(object)) == count;
  return fits ? PySequence_Fast_ITEMS(object) : nullptr;
}

bool read_targets(PyObject* const* fields, Classes classes, Targets* targets) {
  targets->target = as_tensor(fields[0], classes);
  return targets->target != nullptr && read_optional(fields[1], classes, &targets->mask) &&
         read_optional(fields[2], classes, &targets->weight) &&
         read_optional(fields[3], classes, &targets->divisor) &&
         read_optional(fields[4], classes, &targets->pos_weight);
}

bool read_schedule(PyObject* const* fields, Classes classes, Schedule* schedule) {
  PyObject *gamma = fields[0], *temperature = fields[1], *warmup = fields[2];
  schedule->gamma = as_tensor(gamma, classes);
  if (schedule->gamma == nullptr) {
    const bool several = PyTuple_Check(gamma) || PyList_Check(gamma);
    const Py_ssize_t count = several ? PySequence_Fast_GET_SIZE(gamma) : 1;
    for (Py_ssize_t m = 0; m < count; ++m) {
      double value;
      if (!read_number(several ? PySequence_Fast_GET_ITEM(gamma, m) : gamma, &value)) return false;
      schedule->gammas.push_back(value);
    }
  }
  schedule->temperature = as_tensor(temperature, classes);
  if (schedule->temperature == nullptr && !read_number(temperature, &schedule->temperature_number))
    return false;
  schedule->warmup = PyLong_Check(warmup) ? PyLong_AsLongLong(warmup) : -1;
  if (schedule->warmup < 0) {
    PyErr_Clear();
    return false;
  }
  return read_optional(fields[3], classes, &schedule->step);
}

Arguments::Arguments(PyObject* given_targets, PyObject* given_schedule, PyObject* given_options) {
  PyObject* const* fields = items_of(given_targets, std::size(kTargetsFields));
  TORCH_CHECK_TYPE(fields != nullptr && read_targets(fields, Classes::kAll, &targets),
                   "targets: expected Targets with a Tensor");
  fields = items_of(given_schedule, std::size(kScheduleFields));
  TORCH_CHECK_TYPE(fields != nullptr && read_schedule(fields, Classes::kAll, &schedule),
                   "schedule: expected a Schedule of numbers and tensors");
  const Options* read = options_of(given_options);
  TORCH_CHECK_TYPE(read != nullptr, "options: expected Options with a built-in rule (Options.for_kernels)");
  options = *read;
}

// ---- usual calls -----------------------------------------------------------------------------------------

bool no_mode_intercepts() {
  constexpr c10::DispatchKeySet harmless({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView,
                                          DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  constexpr c10::DispatchKeySet autograd(DispatchKey::AutogradFunctionality);
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return within(keys.included_, harmless) && !keys.excluded_.has_any(autograd) &&
         !at::impl::torch_function_mode_enabled() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

const at::Tensor* plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) ? &tensor : nullptr;
}

bool is_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

c10::SmallVector<PyObject*, 8> values_of(PyObject* object) {
  c10::SmallVector<PyObject*, 8> values;
  if (PyDict_CheckExact(object)) {
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(object, &at, &name, &value);) values.push_back(value);
  } else if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    for (Py_ssize_t i = 0; i < count; ++i) values.push_back(PySequence_Fast_GET_ITEM(object, i));
  }
  return values;
}

bool is_usual(const Targets& targets, const Schedule& schedule, const Options& options, at::IntArrayRef shape,
              int64_t modalities, const at::Tensor& like) {
  const bool labels = options.task == kMultilabel;
  const at::ScalarType type = like.scalar_type(), compute = type == at::kDouble ? at::kDouble : at::kFloat;
  const int most = cuda::serves(like) ? cuda::kMaxBranches : cpu::kMaxBranches;
  if (!is_float(type) || shape[1] < (labels ? 1 : 2) || modalities == 0 || modalities >= most) return false;
  if (labels && is_plain_loss(schedule, options)) return false;  // torch's own
  if (options.reduction == kNoReduction || (options.rule == kPaper && modalities != 2)) return false;
  const size_t gammas = schedule.gammas.size();
  if (schedule.gamma == nullptr && gammas != 1 && gammas != size_t(modalities)) return false;
  for (const double gamma : schedule.gammas) {
    if (gamma < 0) return false;
  }
  const at::Tensor* gamma = schedule.gamma;
  if (gamma != nullptr && gamma->dim() != 0 && (gamma->dim() != 1 || gamma->size(0) != modalities))
    return false;
  for (const at::Tensor* number : {schedule.temperature, schedule.step}) {
    if (number != nullptr && number->dim() != 0) return false;
  }
  if (!is_usual_number(gamma, compute, like) || !is_usual_number(schedule.temperature, compute, like) ||
      !is_usual_number(schedule.step, at::kLong, like)) {
    return false;
  }

  const auto is_here = [&](const at::Tensor& tensor) {
    return is_plain(tensor) && tensor.device() == like.device();
  };
  const at::Tensor& target = *targets.target;
  if (!is_here(target)) return false;
  if (labels) {
    if (!target.is_floating_point() || target.sizes() != shape || target.requires_grad()) return false;
  } else {
    const bool indices = target.scalar_type() == at::kLong || target.scalar_type() == at::kInt;
    if (!indices || !target.is_contiguous()) return false;
    if (target.size(0) != shape[0] || target.sizes().slice(1) != shape.slice(2)) return false;
  }
  if (targets.mask != nullptr) {
    const at::Tensor& mask = *targets.mask;
    if (!is_here(mask) || mask.scalar_type() != at::kBool || mask.dim() != 2 || mask.size(0) != shape[0] ||
        mask.size(1) != modalities) {
      return false;
    }
  }
  for (const at::Tensor* weight : {targets.weight, targets.pos_weight}) {
    if (weight != nullptr &&
        (!is_here(*weight) || weight->scalar_type() != compute || weight->sizes() != shape.slice(1, 1) ||
         !weight->is_contiguous() || weight->requires_grad())) {
      return false;
    }
  }
  return targets.divisor == nullptr && (labels || targets.pos_weight == nullptr);
}

// ---- results and autograd nodes --------------------------------------------------------------------------

double value_at(const at::Tensor& packed, int64_t position) {
  const bool is_double = packed.scalar_type() == at::kDouble;
  return is_double ? packed.const_data_ptr<double>()[position] : packed.const_data_ptr<float>()[position];
}

c10::SmallVector<double, 4> link_gradient(const at::Tensor& packed, int modalities) {
  c10::SmallVector<double, 4> gradient;
  const int first = packed_offset<kPackedLink>(modalities);
  for (int at = first; at < first + modalities; ++at) gradient.push_back(value_at(packed, at));
  return gradient;
}

double read_scalar(const at::Tensor& tensor) {
  if (tensor.is_cpu() && tensor.scalar_type() == at::kFloat) return *tensor.const_data_ptr<float>();
  return tensor.item<double>();
}

void refuse_second_derivatives() {
  TORCH_CHECK(
      !at::GradMode::is_enabled(),  // the same words as in arl_fast/_autograd/loss.py
      "arl_loss: got a backward with create_graph=True, but its gradients are computed in the forward pass "
      "and "
      "have no derivatives of their own; use torch.nn.functional.cross_entropy on the branches where second "
      "derivatives are needed");
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
