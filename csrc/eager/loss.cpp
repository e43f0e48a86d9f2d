#include <ATen/SavedTensorHooks.h>
#include <ATen/record_function.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <iterator>
#include <mutex>

#include "../cpu/forward.h"
#include "../cuda_ops.h"
#include "inputs.h"
#include "steps.h"

namespace arl {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

#if defined(ARL_FAST_CUDA_ON_CPU)
constexpr bool kWithoutCpu = true;
#else
constexpr bool kWithoutCpu = false;
#endif

// Hands out the gradients that forward has written: the logits of each branch first, the link last.
struct LossBackward final : Node {
  // Nobody else sees the gradients, so that they need no SavedVariable, unless a saved-tensor hook holds
  // them.
  c10::SmallVector<at::Tensor, 4> grads;
  std::vector<SavedVariable> hooked;
  bool released = false;
  at::Tensor link;            // gains - 1, a part of the packed vector, if the link gets a gradient
  at::ScalarType dtype;       // of the logits
  at::ScalarType link_dtype;  // of the link

  std::string name() const override { return "ARLLossBackward"; }

  variable_list apply(variable_list&& upstreams) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t branches = num_outputs() - 1;
    variable_list results(branches + 1);
    const at::Tensor& upstream = upstreams[0];
    if (!upstream.defined()) return results;
    refuse_second_derivatives();
    const bool keep = !hooked.empty() || torch::autograd::get_current_graph_task_keep_graph();
    for (size_t b = 0; b < branches; ++b) {
      if (task_should_compute_output(b)) results[b] = gradient(b);
    }
    scale(upstream, keep, &results);
    if (link.defined() && task_should_compute_output(branches)) {
      const bool as_is = !keep && link.scalar_type() == link_dtype;
      results[branches] = as_is ? link : link.to(link_dtype, /*non_blocking=*/false, /*copy=*/keep);
    }
    return results;
  }

  at::Tensor gradient(size_t branch) const {
    if (!hooked.empty()) return hooked[branch].unpack();
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    return grads[branch];
  }

  // Those that are defined, in their place unless they are seen again, so that autograd need not copy them.
  void scale(const at::Tensor& upstream, bool keep, variable_list* given) const {
    if (cuda::serves(upstream)) {
      if constexpr (cuda::kBuilt) {
        variable_list defined;
        for (const at::Tensor& g : *given) {
          if (g.defined()) defined.push_back(g);
        }
        if (defined.empty()) return;
        defined = cuda::scale(defined, upstream, std::nullopt, dtype, !keep);
        auto next = defined.begin();
        for (at::Tensor& g : *given) {
          if (g.defined()) g = std::move(*next++);
        }
      }
      return;
    }
    const double factor = read_scalar(upstream);
    for (at::Tensor& g : *given) {
      if (!g.defined()) continue;
      if (g.scalar_type() != dtype) {  // float16 logits: round after scaling
        g = g.mul(factor).to(dtype);
      } else if (keep) {
        g = factor == 1 ? g.clone() : g.mul(factor);
      } else if (factor != 1) {
        g.mul_(factor);
      }
    }
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& grad : hooked) grad.reset_data();
    grads.clear();
    link.reset();
    released = true;
  }
};

// References to objects of Python's while a call lasts, during which another thread may change what they were
// found in.
class Held {
 public:
  ~Held() {
    for (PyObject* object : objects) Py_DECREF(object);
  }
  void hold(PyObject* object) {
    Py_INCREF(object);
    objects.push_back(object);
  }

 private:
  c10::SmallVector<PyObject*, 9> objects;
};

// To where a gradient of a tensor goes, if it needs one.
torch::autograd::Edge edge_of(const at::Tensor& tensor) {
  return tensor.requires_grad() ? torch::autograd::impl::gradient_edge(tensor) : torch::autograd::Edge();
}

// torch's own cross-entropy of the fused logits, recorded by torch: value and gradient to the last bit. It
// does not depend on the unimodal logits and the link, which get no gradient, as in a plain step.
at::Tensor torch_cross_entropy(const at::Tensor& fused, const cpu::Inputs& inputs, const Options& options,
                               const at::Tensor& packed) {
  const at::Tensor target = inputs.targets.target->to(at::kLong);
  at::Tensor x = fused.to(packed.scalar_type());
  const int modalities = int(inputs.logits.size()) - 1;
  if (value_at(packed, packed_offset<kPackedCount>(modalities)) < double(fused.size(0))) {
    // NaN in an ignored row must not reach its gradient
    x = x.masked_fill(target.eq(options.ignore_index).unsqueeze(1), 0);
  }
  const auto weight = inputs.targets.weight == nullptr ? std::optional<at::Tensor>() : *inputs.targets.weight;
  const auto reduction = options.reduction == kMean ? at::Reduction::Mean : at::Reduction::Sum;
  return at::cross_entropy_loss(x, target, weight, reduction, options.ignore_index, options.label_smoothing);
}

// Logits [B, C, d1, ...] without gaps as [B, C, d1 ...], with a row for each position. Labels as
// [B, C d1 ...]: a pair counts by itself, wherever it lies, and the weights of a label are repeated for its
// positions. The inputs borrow what is held here.
struct Flat {
  variable_list logits;
  at::Tensor target, weight, pos_weight;

  Flat(cpu::Inputs* inputs, bool labels) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor& fused = *inputs->logits[0];
    const int64_t rows = fused.size(0), positions = c10::multiply_integers(fused.sizes().slice(2));
    const int64_t columns = fused.size(1) * positions;
    for (const at::Tensor* x : inputs->logits) {
      logits.push_back(labels ? x->view({rows, columns}) : x->view({rows, fused.size(1), positions}));
    }
    for (size_t b = 0; b < logits.size(); ++b) inputs->logits[b] = &logits[b];
    const at::Tensor& given = *inputs->targets.target;
    target = labels ? given.reshape({rows, columns}) : given.view({rows * positions});
    inputs->targets.target = &target;
    if (!labels) return;
    const auto repeat = [positions](const at::Tensor** given, at::Tensor* own) {
      if (*given == nullptr) return;
      *own = (*given)->repeat_interleave(positions);
      *given = own;
    };
    repeat(&inputs->targets.weight, &weight);
    repeat(&inputs->targets.pos_weight, &pos_weight);
  }
};

// Attributes of ARLLoss, and of the link, that are read or written here.
struct Names {
  PyObject* options = PyUnicode_InternFromString("options");
  PyObject* gamma = PyUnicode_InternFromString("gamma");
  PyObject* temperature = PyUnicode_InternFromString("temperature");
  PyObject* warmup = PyUnicode_InternFromString("warmup");
  PyObject* training = PyUnicode_InternFromString("training");
  PyObject* sync_stats = PyUnicode_InternFromString("sync_stats");
  PyObject* history = PyUnicode_InternFromString("history");
  PyObject* unseen = PyUnicode_InternFromString("_unseen");
  PyObject* buffers = PyUnicode_InternFromString("_buffers");
  PyObject* weight = PyUnicode_InternFromString("weight");
  PyObject* pos_weight = PyUnicode_InternFromString("pos_weight");
  PyObject* steps = PyUnicode_InternFromString("steps");
  PyObject* packed = PyUnicode_InternFromString("_packed");
  PyObject* modalities = PyUnicode_InternFromString("modalities");
  PyObject* mask = PyUnicode_InternFromString("mask");
};

const Names& names() {
  static const Names& interned = *new Names;
  return interned;
}

// An attribute of a tensor's own, borrowed, or null.
PyObject* attribute_of(PyObject* tensor, PyObject* name) {
  PyObject** attributes = _PyObject_GetDictPtr(tensor);
  return attributes == nullptr || *attributes == nullptr ? nullptr
                                                         : PyDict_GetItemWithError(*attributes, name);
}

// Whether the modalities' names, if unimodal has any, come in the order that modulate has left on its link.
bool names_agree(PyObject* unimodal, PyObject* link) {
  if (!PyDict_CheckExact(unimodal)) return true;
  PyObject* own = attribute_of(link, names().modalities);
  if (own == nullptr) return true;
  if (!PyTuple_CheckExact(own) || PyTuple_GET_SIZE(own) != PyDict_GET_SIZE(unimodal)) return false;
  PyObject *name, *value;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; PyDict_Next(unimodal, &at, &name, &value); ++i) {
    PyObject* expected = PyTuple_GET_ITEM(own, i);
    if (name != expected && PyObject_RichCompareBool(name, expected, Py_EQ) != 1) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

// The loss and the statistics of BranchLogits and the fields of Targets and Schedule; nothing if anything is
// unusual or wrong.
std::optional<cpu::Outputs> usual_loss(PyObject* options_object, PyObject* output, PyObject* const* targets,
                                       PyObject* const* numbers) {
  PyObject* const* branches = items_of(output, std::size(kBranchLogitsFields));
  if (branches == nullptr || !no_mode_intercepts()) return std::nullopt;
  PyObject *unimodal = branches[1], *link_object = branches[2];
  const Options* options = options_of(options_object);
  const at::Tensor* fused = plain(branches[0]);
  if (options == nullptr || fused == nullptr) return std::nullopt;
  const bool dense = fused->dim() > 2, labels = options->task == kMultilabel;
  if (fused->dim() < 2 || (dense && !labels && cuda::serves(*fused))) return std::nullopt;
  if (dense && !labels && (fused->numel() == 0 || fused->size(1) > cpu::kColumnClasses)) return std::nullopt;
  if (!fused->is_cpu() && !cuda::serves(*fused)) return std::nullopt;
  const auto values = values_of(unimodal);
  const int64_t modalities = int64_t(values.size());
  const at::ScalarType type = fused->scalar_type();
  cpu::Inputs inputs;
  Schedule schedule;
  if (!read_targets(targets, Classes::kOwn, &inputs.targets) ||
      !read_schedule(numbers, Classes::kOwn, &schedule) ||
      !is_usual(inputs.targets, schedule, *options, fused->sizes(), modalities, *fused)) {
    return std::nullopt;
  }
  if ((cuda::serves(*fused) || dense) && is_plain_loss(schedule, *options)) return std::nullopt;

  c10::SmallVector<const at::Tensor*, 4> logits;
  Held held;
  const bool record = at::GradMode::is_enabled();
  for (int64_t b = 0; b <= modalities; ++b) {
    const at::Tensor* x = b == 0 ? fused : plain(values[b - 1]);
    if (x == nullptr || x->scalar_type() != type || x->sizes() != fused->sizes() ||
        x->device() != fused->device() || !(dense ? x->is_contiguous() : x->stride(1) == 1)) {
      return std::nullopt;
    }
    if (record && x->requires_grad()) inputs.wanted |= uint64_t(1) << b;
    logits.push_back(x);
    if (b > 0) held.hold(values[b - 1]);
  }
  inputs.logits = logits;

  const at::Tensor* link = nullptr;
  if (link_object != Py_None) {
    link = plain(link_object);
    if (link == nullptr || link->device() != fused->device() || link->dim() != 1 ||
        link->size(0) != modalities || !link->is_floating_point() || !names_agree(unimodal, link_object)) {
      return std::nullopt;
    }
  } else if (inputs.wanted != 0 && options->rule != kNone) {
    return std::nullopt;  // a missing link: the general path says so
  }

  RECORD_FUNCTION("arl_fast::loss", c10::ArrayRef<const c10::IValue>());
  std::optional<cpu::Outputs> outputs(std::in_place);
  cpu::Outputs& results = *outputs;
  {
    const bool on_cuda = cuda::serves(*fused);
    std::optional<pybind11::gil_scoped_release> release;
    if (on_cuda || fused->numel() > 16384) release.emplace();
    std::optional<Flat> flat;
    if (dense) flat.emplace(&inputs, labels);
    if (on_cuda) {
      if constexpr (cuda::kBuilt) {
        variable_list given, grads;
        for (const at::Tensor* x : inputs.logits) given.push_back(*x);
        std::tie(results.loss, results.packed, grads) = cuda::forward(
            given, inputs.targets, schedule, *options, inputs.wanted != 0, cuda::Memory::kShared);
        results.grads.assign(grads.begin(), grads.end());
      }
    } else {
      if constexpr (!kWithoutCpu) {
        if (is_plain_loss(schedule, *options)) inputs.wanted = 0;
        inputs.numbers = cpu::read(schedule);
        inputs.shared = true;
        results = cpu::forward(inputs, *options);
        if (is_plain_loss(schedule, *options)) {
          results.loss = torch_cross_entropy(*fused, inputs, *options, results.packed);
        }
      }
    }
    for (at::Tensor& g : results.grads) {
      if (dense && g.defined()) g = g.view(fused->sizes());
    }
    if (inputs.wanted != 0) {
      const auto node = make_node<LossBackward>();
      node->dtype = type;
      const bool has_link = link != nullptr && link->requires_grad();
      for (const at::Tensor* x : logits) node->add_next_edge(edge_of(*x));
      node->add_next_edge(has_link ? edge_of(*link) : torch::autograd::Edge());
      if (at::SavedTensorDefaultHooks::get_hooks().has_value()) {
        for (const at::Tensor& grad : results.grads) node->hooked.emplace_back(grad, /*is_output=*/false);
      } else {
        node->grads = std::move(results.grads);
      }
      if (has_link) {
        node->link_dtype = link->scalar_type();
        node->link = part_of(results.packed, packed_offset<kPackedLink>(int(modalities)), {modalities});
      }
      torch::autograd::set_history(results.loss, node);
    }
  }
  return outputs;
}

}  // namespace

PyObject* fast_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != Py_ssize_t(std::size(kFastLoss))) Py_RETURN_NONE;
  PyObject* const* targets = items_of(args[2], std::size(kTargetsFields));
  PyObject* const* schedule = items_of(args[3], std::size(kScheduleFields));
  if (targets == nullptr || schedule == nullptr) Py_RETURN_NONE;
  std::optional<cpu::Outputs> outputs = usual_loss(args[0], args[1], targets, schedule);
  if (!outputs) Py_RETURN_NONE;
  return pair(THPVariable_Wrap(std::move(outputs->loss)), THPVariable_Wrap(std::move(outputs->packed)));
  END_HANDLE_TH_ERRORS
}

PyObject* fast_criterion(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != Py_ssize_t(std::size(kFastCriterion))) Py_RETURN_NONE;
  THPObjectPtr attributes(PyObject_GenericGetDict(args[0], nullptr));
  if (!attributes) return nullptr;
  PyObject *own = attributes, *mask = args[3];
  PyObject* const* branches = items_of(args[1], std::size(kBranchLogitsFields));
  PyObject* buffers = PyDict_GetItemWithError(own, names().buffers);
  PyObject* options = PyDict_GetItemWithError(own, names().options);
  PyObject* warmup = PyDict_GetItemWithError(own, names().warmup);
  const bool record = at::GradMode::is_enabled();
  if (branches == nullptr || buffers == nullptr || !PyDict_Check(buffers) || options == nullptr ||
      warmup == nullptr || !PyLong_CheckExact(warmup) ||
      PyDict_GetItemWithError(own, names().sync_stats) != Py_False ||
      PyDict_GetItemWithError(own, names().history) != Py_None ||
      (record && PyDict_GetItemWithError(own, names().unseen) != Py_False)) {
    Py_RETURN_NONE;
  }
  PyObject *unimodal = branches[1], *link = branches[2];
  if (mask == Py_None && THPVariable_CheckExact(link)) {
    PyObject* of_head = attribute_of(link, names().mask);
    if (of_head != nullptr) mask = of_head;
  }
  const bool warms = PyObject_IsTrue(warmup) == 1;
  PyObject* steps = warms ? PyDict_GetItemWithError(buffers, names().steps) : Py_None;
  PyObject* const targets[] = {args[2], mask, PyDict_GetItemWithError(buffers, names().weight),
                               /*divisor=*/Py_None, PyDict_GetItemWithError(buffers, names().pos_weight)};
  PyObject* const schedule[] = {PyDict_GetItemWithError(own, names().gamma),
                                PyDict_GetItemWithError(own, names().temperature), warmup, steps};
  Held held;
  for (const auto fields : {c10::ArrayRef<PyObject*>(targets), c10::ArrayRef<PyObject*>(schedule)}) {
    for (PyObject* object : fields) {
      if (object == nullptr) Py_RETURN_NONE;
      held.hold(object);
    }
  }
  std::optional<cpu::Outputs> outputs = usual_loss(options, args[1], targets, schedule);
  if (!outputs) Py_RETURN_NONE;
  THPObjectPtr packed(THPVariable_Wrap(std::move(outputs->packed)));
  THPObjectPtr modalities(PyDict_Check(unimodal) ? PySequence_Tuple(unimodal)
                                                 : pybind11::none().release().ptr());
  if (!packed || !modalities || PyDict_SetItem(own, names().packed, packed) != 0 ||
      PyDict_SetItem(own, names().modalities, modalities) != 0) {
    return nullptr;
  }
  if (warms && record && PyDict_GetItemWithError(own, names().training) == Py_True) {
    at::Tensor(THPVariable_Unpack(steps)).add_(1);  // after the loss has read it
  }
  return THPVariable_Wrap(std::move(outputs->loss));
  END_HANDLE_TH_ERRORS
}

}  // namespace arl
