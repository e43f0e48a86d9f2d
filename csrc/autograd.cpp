#include "autograd.h"

#include <ATen/EmptyTensor.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <mutex>

#include "cpu/forward.h"
#include "eager.h"

namespace arl {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---- backward of the loss ------------------------------------------------------------------------------------------

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
    refuse_second_derivatives();
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

// ---- the plain loss ------------------------------------------------------------------------------------------------

// torch's own cross-entropy of the fused logits, recorded by torch: value and gradient to the last bit. It does not depend
// on the unimodal logits and the link, which get no gradient, as in a plain step.
at::Tensor torch_cross_entropy(const at::Tensor& fused, const cpu::Inputs& inputs, const Options& options, const at::Tensor& packed) {
  const int branches = int(inputs.logits.size());
  const at::Tensor target = inputs.target->to(at::kLong);
  at::Tensor x = fused.to(packed.scalar_type());
  if (value_at(packed, sums_offset(branches - 1) + kCount * branches) < double(fused.size(0))) {
    x = x.masked_fill(target.eq(options.ignore_index).unsqueeze(1), 0);  // NaN in an ignored row must not reach its gradient
  }
  const auto weight = inputs.weight == nullptr ? std::optional<at::Tensor>() : *inputs.weight;
  const auto reduction = options.reduction == kMean ? at::Reduction::Mean : at::Reduction::Sum;
  return at::cross_entropy_loss(x, target, weight, reduction, options.ignore_index, options.label_smoothing);
}

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
  PyObject *unimodal = args[2], *link_object = args[4];
  const Options* options = options_of(args[0]);
  const at::Tensor* fused = plain(args[1]);
  if (options == nullptr || fused == nullptr || fused->dim() != 2) Py_RETURN_NONE;
  const auto values = values_of(unimodal);
  const int64_t modalities = int64_t(values.size());
  const at::ScalarType type = fused->scalar_type();
  cpu::Inputs inputs;
  if (!read_inputs(args[3], args + 5, *options, fused->size(0), fused->size(1), modalities, type, &inputs)) Py_RETURN_NONE;

  c10::SmallVector<at::Tensor, 4> logits;
  const bool record = at::GradMode::is_enabled();
  for (int64_t b = 0; b <= modalities; ++b) {
    const at::Tensor* x = b == 0 ? fused : plain(values[b - 1]);
    if (x == nullptr || x->scalar_type() != type || x->sizes() != fused->sizes() || x->stride(1) != 1) Py_RETURN_NONE;
    if (record && x->requires_grad()) inputs.wanted |= uint64_t(1) << b;
    logits.push_back(*x);
  }
  inputs.logits = logits;

  const at::Tensor* link = nullptr;
  if (link_object != Py_None) {
    link = plain(link_object);
    if (link == nullptr || link->dim() != 1 || link->size(0) != modalities || !link->is_floating_point() ||
        !names_agree(unimodal, link_object)) {
      Py_RETURN_NONE;
    }
  } else if (inputs.wanted != 0 && options->rule != kNone) {
    Py_RETURN_NONE;  // a missing link: the general path says so
  }

  RECORD_FUNCTION("arl_fast::loss", c10::ArrayRef<const c10::IValue>());
  cpu::Outputs outputs;
  {
    std::optional<pybind11::gil_scoped_release> release;
    if (fused->numel() > 16384) release.emplace();
    if (is_plain(inputs, *options)) inputs.wanted = 0;
    outputs = cpu::forward(inputs, *options);
    if (is_plain(inputs, *options)) {
      outputs.loss = torch_cross_entropy(*fused, inputs, *options, outputs.packed);
    } else if (inputs.wanted != 0) {
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
        node->gain_minus_one = link_gradient(outputs.packed, int(modalities));
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
