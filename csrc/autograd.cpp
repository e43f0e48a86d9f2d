#include "autograd.h"

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <type_traits>
#include <unordered_map>

#include "cpu/forward.h"

namespace arl {
namespace {

using c10::DispatchKey;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// torch keeps nodes in shared_ptr up to 2.12 or so and in intrusive_ptr from then on; an edge knows which.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class T>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    return std::make_shared<T>();
  } else {
    return c10::make_intrusive<T>();
  }
}

// ---- what counts as usual ------------------------------------------------------------------------------------------

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) { return (keys.raw_repr() & ~allowed.raw_repr()) == 0; }

// No mode that wants to see the operations: functorch, FakeTensor, tracing, torch-function modes, forward-mode AD.
bool nobody_watches() {
  constexpr c10::DispatchKeySet harmless({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU,
                                          DispatchKey::AutocastCUDA});
  constexpr c10::DispatchKeySet autograd(DispatchKey::AutogradFunctionality);
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return within(keys.included_, harmless) && !keys.excluded_.has_any(autograd) && !at::impl::torch_function_mode_enabled() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

// A dense CPU tensor of torch's own class, or null.
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

// ---- options -------------------------------------------------------------------------------------------------------

// Position of a Python string in a list of names, or -1.
int position(PyObject* text, std::initializer_list<const char*> names) {
  const char* own = PyUnicode_Check(text) ? PyUnicode_AsUTF8(text) : nullptr;
  int i = 0;
  for (const char* name : names) {
    if (own != nullptr && std::strcmp(own, name) == 0) return i;
    ++i;
  }
  return -1;
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

// ---- backward of the loss ------------------------------------------------------------------------------------------

double read_scalar(const at::Tensor& tensor) {
  if (tensor.is_cpu() && tensor.scalar_type() == at::kFloat) return *tensor.const_data_ptr<float>();
  return tensor.item<double>();
}

// Hands out the gradients that forward has written: the logits of each branch first, the link last.
struct LossBackward final : Node {
  c10::SmallVector<SavedVariable, 4> grads;
  c10::SmallVector<double, 4> gain_minus_one;
  at::ScalarType dtype;       // of the logits
  at::ScalarType link_dtype;  // of the link, if there is one
  bool has_link = false;
  bool hooked = false;  // a saved-tensor hook may hold the gradients too

  std::string name() const override { return "ARLLossBackward"; }

  variable_list apply(variable_list&& upstreams) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t branches = grads.size();
    variable_list results(branches + 1);
    if (!upstreams[0].defined()) return results;
    TORCH_CHECK(!at::GradMode::is_enabled(),  // the same words as refuse_second_derivatives in functional.py
                "arl_loss: got a backward with create_graph=True, but its gradients are computed in the forward pass and have no "
                "derivatives of their own; use torch.nn.functional.cross_entropy on the branches where second derivatives are needed");
    const double upstream = read_scalar(upstreams[0]);
    const bool keep = hooked || torch::autograd::get_current_graph_task_keep_graph();
    for (size_t b = 0; b < branches; ++b) {
      if (task_should_compute_output(b)) results[b] = scaled(grads[b].unpack(), upstream, keep);
    }
    if (has_link && task_should_compute_output(branches)) {
      at::Tensor link = at::detail::empty_cpu({int64_t(gain_minus_one.size())}, at::kDouble);
      std::copy(gain_minus_one.begin(), gain_minus_one.end(), link.mutable_data_ptr<double>());
      results[branches] = link.to(link_dtype);
    }
    return results;
  }

  // The buffer itself where nobody else will see it again, so that autograd need not copy it.
  at::Tensor scaled(at::Tensor g, double upstream, bool keep) const {
    if (g.scalar_type() != dtype) return g.mul(upstream).to(dtype);  // float16 logits: round after scaling
    if (keep) return upstream == 1 ? g.clone() : g.mul(upstream);
    return upstream == 1 ? g : g.mul_(upstream);
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& grad : grads) grad.reset_data();
  }
};

// Whether the modalities' names, if unimodal has any, come in the order that modulate has left on its link.
bool names_agree(PyObject* unimodal, PyObject* link) {
  static PyObject* attribute = PyUnicode_InternFromString("modalities");
  if (!PyDict_CheckExact(unimodal)) return true;
  PyObject** attributes = _PyObject_GetDictPtr(link);
  PyObject* names = attributes == nullptr || *attributes == nullptr ? nullptr : PyDict_GetItem(*attributes, attribute);
  if (names == nullptr) return true;
  if (!PyTuple_CheckExact(names) || PyTuple_GET_SIZE(names) != PyDict_GET_SIZE(unimodal)) return false;
  PyObject *name, *value;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; PyDict_Next(unimodal, &at, &name, &value); ++i) {
    PyObject* expected = PyTuple_GET_ITEM(names, i);
    if (name != expected && PyObject_RichCompareBool(name, expected, Py_EQ) != 1) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

// The unimodal logits, borrowed, from a dict, list or tuple; none if it is something else.
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

// ---- backward of modulate ------------------------------------------------------------------------------------------

// g_m * (1 + link_m) for every modality (Eq. 19, with link_m = gain_m - 1).
struct ModulateBackward final : Node {
  std::string name() const override { return "ARLModulateBackward"; }

  variable_list apply(variable_list&& grads) override {
    const at::Tensor link = std::move(grads.back());
    grads.pop_back();
    if (!link.defined()) return std::move(grads);  // no loss has used it
    const at::Tensor values = link.detach().to(at::kDouble).contiguous();
    const double* value = values.const_data_ptr<double>();
    for (size_t m = 0; m < grads.size(); ++m) {
      at::Tensor& g = grads[m];
      if (!g.defined()) continue;
      const bool alone = !at::GradMode::is_enabled() && g.use_count() == 1 && g.storage().use_count() == 1 &&
                         g.is_non_overlapping_and_dense();  // not one that expand() has made
      g = alone ? g.mul_(1 + value[m]) : g.mul(1 + value[m]);
    }
    return std::move(grads);
  }
};

// The same memory under a new tensor with the same version counter: writing into it still alarms who saved the original.
at::Tensor alias_of(const at::Tensor& tensor) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  return at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/true));
}

}  // namespace

PyObject* fast_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 10 || !nobody_watches()) Py_RETURN_NONE;
  PyObject *unimodal = args[2], *link_object = args[4], *mask_object = args[5], *weight_object = args[6];
  const Options* options = options_of(args[0]);
  const at::Tensor* fused = plain(args[1]);
  const at::Tensor* target = plain(args[3]);
  if (options == nullptr || fused == nullptr || target == nullptr || options->reduction == kNoReduction) Py_RETURN_NONE;
  double gamma, temperature, warming;
  if (!number(args[7], &gamma) || !number(args[8], &temperature) || !number(args[9], &warming) || gamma < 0) Py_RETURN_NONE;
  if (PyBool_Check(args[7]) || PyBool_Check(args[8])) Py_RETURN_NONE;
  if (gamma == 0 && options->rule == kNone) Py_RETURN_NONE;  // torch's own cross-entropy, to the last bit

  const auto values = values_of(unimodal);
  const int64_t modalities = int64_t(values.size());
  if (modalities == 0 || modalities >= cpu::kMaxBranches || (options->rule == kPaper && modalities != 2)) Py_RETURN_NONE;
  const at::ScalarType type = fused->scalar_type();
  const at::ScalarType compute = type == at::kDouble ? at::kDouble : at::kFloat;
  if (!is_float(type) || fused->dim() != 2 || fused->size(1) == 0) Py_RETURN_NONE;
  if ((target->scalar_type() != at::kLong && target->scalar_type() != at::kInt) || target->dim() != 1 ||
      target->size(0) != fused->size(0) || !target->is_contiguous()) {
    Py_RETURN_NONE;
  }

  c10::SmallVector<at::Tensor, 4> logits;
  uint64_t wanted = 0;
  const bool record = at::GradMode::is_enabled();
  for (int64_t b = 0; b <= modalities; ++b) {
    const at::Tensor* x = b == 0 ? fused : plain(values[b - 1]);
    if (x == nullptr || x->scalar_type() != type || x->sizes() != fused->sizes() || x->stride(1) != 1) Py_RETURN_NONE;
    if (record && x->requires_grad()) wanted |= uint64_t(1) << b;
    logits.push_back(*x);
  }

  const at::Tensor *link = nullptr, *mask = nullptr, *weight = nullptr;
  if (link_object != Py_None) {
    link = plain(link_object);
    if (link == nullptr || link->dim() != 1 || link->size(0) != modalities || !link->is_floating_point() ||
        !names_agree(unimodal, link_object)) {
      Py_RETURN_NONE;
    }
  } else if (wanted != 0 && options->rule != kNone) {
    Py_RETURN_NONE;  // a missing link: the general path says so
  }
  if (mask_object != Py_None) {
    mask = plain(mask_object);
    if (mask == nullptr || mask->scalar_type() != at::kBool || mask->dim() != 2 || mask->size(0) != fused->size(0) ||
        mask->size(1) != modalities) {
      Py_RETURN_NONE;
    }
  }
  if (weight_object != Py_None) {
    weight = plain(weight_object);
    if (weight == nullptr || weight->scalar_type() != compute || weight->dim() != 1 || weight->size(0) != fused->size(1) ||
        !weight->is_contiguous() || weight->requires_grad()) {
      Py_RETURN_NONE;
    }
  }

  RECORD_FUNCTION("arl_fast::loss", c10::ArrayRef<const c10::IValue>());
  cpu::Outputs outputs;
  {
    std::optional<pybind11::gil_scoped_release> release;
    if (fused->numel() > 16384) release.emplace();
    cpu::Inputs inputs{logits, target, mask, weight};
    inputs.gamma = gamma;
    inputs.temperature = temperature;
    inputs.warming = warming != 0;
    inputs.wanted = wanted;
    outputs = cpu::forward(inputs, *options);
    if (wanted != 0) {
      const auto node = make_node<LossBackward>();
      node->dtype = type;
      node->hooked = at::SavedTensorDefaultHooks::get_hooks().has_value();
      node->has_link = link != nullptr && link->requires_grad();
      variable_list edges(logits.begin(), logits.end());
      edges.push_back(node->has_link ? *link : at::Tensor());
      node->set_next_edges(torch::autograd::collect_next_edges(edges));
      for (at::Tensor& grad : outputs.grads) {
        node->grads.emplace_back(std::move(grad), /*is_output=*/false);
      }
      if (node->has_link) {
        node->link_dtype = link->scalar_type();
        for (int64_t m = 0; m < modalities; ++m) {
          const int64_t at = link_offset(int(modalities)) + m;
          node->gain_minus_one.push_back(compute == at::kDouble ? outputs.packed.const_data_ptr<double>()[at]
                                                                : outputs.packed.const_data_ptr<float>()[at]);
        }
      }
      torch::autograd::set_history(outputs.loss, node);
    }
  }
  return pair(THPVariable_Wrap(std::move(outputs.loss)), THPVariable_Wrap(std::move(outputs.packed)));
  END_HANDLE_TH_ERRORS
}

PyObject* fast_modulate(PyObject*, PyObject* features) {
  HANDLE_TH_ERRORS
  if (!PyList_CheckExact(features) || PyList_GET_SIZE(features) == 0 || !nobody_watches()) Py_RETURN_NONE;
  variable_list tensors;
  bool requires_grad = false, is_double = false;
  for (Py_ssize_t m = 0; m < PyList_GET_SIZE(features); ++m) {
    const at::Tensor* z = plain(PyList_GET_ITEM(features, m));
    if (z == nullptr || !is_float(z->scalar_type()) || z->is_inference()) Py_RETURN_NONE;
    requires_grad |= z->requires_grad();
    is_double |= z->scalar_type() == at::kDouble;
    tensors.push_back(*z);
  }
  variable_list outputs;
  for (const at::Tensor& z : tensors) outputs.push_back(alias_of(z));
  at::Tensor link = at::detail::empty_cpu({int64_t(tensors.size())}, is_double ? at::kDouble : at::kFloat);
  std::memset(link.mutable_data_ptr(), 0, link.nbytes());
  if (requires_grad && at::GradMode::is_enabled()) {
    const auto node = make_node<ModulateBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(tensors));
    for (at::Tensor& z : outputs) torch::autograd::set_history(z, node);
    torch::autograd::set_history(link, node);
  }
  PyObject* list = PyList_New(Py_ssize_t(outputs.size()));
  if (list == nullptr) return nullptr;
  for (size_t m = 0; m < outputs.size(); ++m) PyList_SET_ITEM(list, Py_ssize_t(m), THPVariable_Wrap(std::move(outputs[m])));
  return pair(list, THPVariable_Wrap(std::move(link)));
  END_HANDLE_TH_ERRORS
}

}  // namespace arl
