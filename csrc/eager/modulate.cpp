// modulate in one call for usual eager calls: identity on the features, whose gradients the link's
// then scales.
#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <map>
#include <tuple>

#include "../cuda_ops.h"
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
    if (cuda::serves(link)) {
      if constexpr (cuda::kBuilt) on_cuda(link, &grads);
      return std::move(grads);
    }
    const at::Tensor values = link.detach().to(at::kDouble).contiguous();
    const double* value = values.const_data_ptr<double>();
    for (size_t m = 0; m < grads.size(); ++m) {
      at::Tensor& g = grads[m];
      if (!g.defined()) continue;
      g = is_ours(g) ? g.mul_(1 + value[m]) : g.mul(1 + value[m]);
    }
    return std::move(grads);
  }

  // Whether nobody else holds the memory, and no two elements share theirs, as after expand().
  static bool is_ours(const at::Tensor& g) {
    return !at::GradMode::is_enabled() && g.use_count() == 1 && g.storage().use_count() == 1 &&
           g.is_non_overlapping_and_dense();
  }

  static void on_cuda(const at::Tensor& link, variable_list* grads) {
    c10::SmallVector<int64_t, 8> modalities;
    std::vector<char> reuse;
    variable_list given;
    for (size_t m = 0; m < grads->size(); ++m) {
      at::Tensor& g = (*grads)[m];
      if (!g.defined()) continue;
      modalities.push_back(int64_t(m));
      reuse.push_back(is_ours(g));
      given.push_back(std::move(g));
    }
    variable_list modulated = cuda::modulate_backward(given, modalities, link, reuse);
    for (size_t i = 0; i < modalities.size(); ++i) (*grads)[modalities[i]] = std::move(modulated[i]);
  }
};

// The same memory under a new tensor with the same version counter: writing into it still alarms who saved
// the original.
at::Tensor alias_of(const at::Tensor& tensor) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  return at::Tensor(
      impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/true));
}

at::Tensor zeros_on_cpu(int64_t size, at::ScalarType type) {
  at::Tensor zeros = at::detail::empty_cpu({size}, type);
  std::memset(zeros.mutable_data_ptr(), 0, zeros.nbytes());
  return zeros;
}

// Zeros [M] for the link, made once: who writes to them raises their version, and new ones are made.
at::Tensor zero_link(const at::Tensor& like, int64_t modalities, at::ScalarType type) {
  if (like.is_cpu()) return zeros_on_cpu(modalities, type);
  using Key = std::tuple<int, int64_t, int>;
  static auto* known = new std::map<Key, at::Tensor>;  // behind Python's lock
  const at::TensorOptions options = like.options().dtype(type);
  if (cuda::is_capturing(like)) return at::zeros({modalities}, options);  // memory of the graph stays in it
  at::Tensor& zeros = (*known)[{int(like.get_device()), modalities, int(type)}];
  if (!zeros.defined() || zeros._version() != 0) zeros = at::zeros({modalities}, options);
  return alias_of(zeros);
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
    if (!z->is_cpu() && !cuda::serves(*z)) Py_RETURN_NONE;
    if (m > 0 && z->device() != tensors[0].device()) Py_RETURN_NONE;
    requires_grad |= z->requires_grad();
    is_double |= z->scalar_type() == at::kDouble;
    tensors.push_back(*z);
  }
  variable_list outputs;
  for (const at::Tensor& z : tensors) outputs.push_back(alias_of(z));
  const at::ScalarType type = is_double ? at::kDouble : at::kFloat;
  at::Tensor link;
  if constexpr (cuda::kBuilt) {
    link = zero_link(tensors[0], int64_t(tensors.size()), type);
  } else {
    link = zeros_on_cpu(int64_t(tensors.size()), type);
  }
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
