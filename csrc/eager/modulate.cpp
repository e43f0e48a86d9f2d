// modulate in one call for usual eager calls on a CPU: identity on the features, whose gradients the link's
// then scales.
#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

#include "inputs.h"
#include "steps.h"

namespace arl {
namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

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
      // Nobody else holds the memory, and no two elements share theirs, as after expand().
      const bool is_ours = !at::GradMode::is_enabled() && g.use_count() == 1 &&
                           g.storage().use_count() == 1 && g.is_non_overlapping_and_dense();
      g = is_ours ? g.mul_(1 + value[m]) : g.mul(1 + value[m]);
    }
    return std::move(grads);
  }
};

// The same memory under a new tensor with the same version counter: writing into it still alarms who saved
// the original.
at::Tensor alias_of(const at::Tensor& tensor) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  return at::Tensor(
      impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/true));
}

}  // namespace

PyObject* fast_modulate(PyObject*, PyObject* features) {
  HANDLE_TH_ERRORS
  if (!PyList_CheckExact(features) || PyList_GET_SIZE(features) == 0 || !no_mode_intercepts()) Py_RETURN_NONE;
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
  for (size_t m = 0; m < outputs.size(); ++m)
    PyList_SET_ITEM(list, Py_ssize_t(m), THPVariable_Wrap(std::move(outputs[m])));
  return pair(list, THPVariable_Wrap(std::move(link)));
  END_HANDLE_TH_ERRORS
}

}  // namespace arl
