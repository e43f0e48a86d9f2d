#include <ATen/SavedTensorHooks.h>
#include <ATen/record_function.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

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
  c10::SmallVector<SavedVariable, 4> grads;
  at::Tensor link;            // gains - 1, a part of the packed vector, if the link gets a gradient
  at::ScalarType dtype;       // of the logits
  at::ScalarType link_dtype;  // of the link
  bool hooked = false;        // a saved-tensor hook may hold the gradients too

  std::string name() const override { return "ARLLossBackward"; }

  variable_list apply(variable_list&& upstreams) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t branches = grads.size();
    variable_list results(branches + 1);
    const at::Tensor& upstream = upstreams[0];
    if (!upstream.defined()) return results;
    refuse_second_derivatives();
    const bool keep = hooked || torch::autograd::get_current_graph_task_keep_graph();
    for (size_t b = 0; b < branches; ++b) {
      if (task_should_compute_output(b)) results[b] = grads[b].unpack();
    }
    scale(upstream, keep, &results);
    if (link.defined() && task_should_compute_output(branches)) {
      const bool as_is = !keep && link.scalar_type() == link_dtype;
      results[branches] = as_is ? link : link.to(link_dtype, /*non_blocking=*/false, /*copy=*/keep);
    }
    return results;
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
    for (SavedVariable& grad : grads) grad.reset_data();
    link.reset();
  }
};

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
    const at::Tensor& fused = inputs->logits[0];
    const int64_t rows = fused.size(0), positions = c10::multiply_integers(fused.sizes().slice(2));
    const int64_t columns = fused.size(1) * positions;
    for (const at::Tensor& x : inputs->logits) {
      logits.push_back(labels ? x.view({rows, columns}) : x.view({rows, fused.size(1), positions}));
    }
    inputs->logits = logits;
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

// Whether the modalities' names, if unimodal has any, come in the order that modulate has left on its link.
bool names_agree(PyObject* unimodal, PyObject* link) {
  static PyObject* attribute = PyUnicode_InternFromString("modalities");
  if (!PyDict_CheckExact(unimodal)) return true;
  PyObject** attributes = _PyObject_GetDictPtr(link);
  PyObject* names =
      attributes == nullptr || *attributes == nullptr ? nullptr : PyDict_GetItem(*attributes, attribute);
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

}  // namespace

PyObject* fast_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != Py_ssize_t(std::size(kFastLoss))) Py_RETURN_NONE;
  PyObject* const* branches = items_of(args[1], std::size(kBranchLogitsFields));
  if (branches == nullptr || !no_mode_intercepts()) Py_RETURN_NONE;
  PyObject *unimodal = branches[1], *link_object = branches[2];
  const Options* options = options_of(args[0]);
  const at::Tensor* fused = plain(branches[0]);
  if (options == nullptr || fused == nullptr) Py_RETURN_NONE;
  const bool dense = fused->dim() > 2, labels = options->task == kMultilabel;
  if (fused->dim() < 2 || (dense && !labels && cuda::serves(*fused))) Py_RETURN_NONE;
  if (dense && !labels && (fused->numel() == 0 || fused->size(1) > cpu::kColumnClasses)) Py_RETURN_NONE;
  if (!fused->is_cpu() && !cuda::serves(*fused)) Py_RETURN_NONE;
  const auto values = values_of(unimodal);
  const int64_t modalities = int64_t(values.size());
  const at::ScalarType type = fused->scalar_type();
  cpu::Inputs inputs;
  Schedule schedule;
  if (!read_targets(args + 2, Classes::kOwn, &inputs.targets) ||
      !read_schedule(args + 2 + std::size(kTargetsFields), Classes::kOwn, &schedule) ||
      !is_usual(inputs.targets, schedule, *options, fused->sizes(), modalities, *fused)) {
    Py_RETURN_NONE;
  }
  if ((cuda::serves(*fused) || dense) && is_plain_loss(schedule, *options)) Py_RETURN_NONE;

  c10::SmallVector<at::Tensor, 4> logits;
  const bool record = at::GradMode::is_enabled();
  for (int64_t b = 0; b <= modalities; ++b) {
    const at::Tensor* x = b == 0 ? fused : plain(values[b - 1]);
    if (x == nullptr || x->scalar_type() != type || x->sizes() != fused->sizes() ||
        x->device() != fused->device() || !(dense ? x->is_contiguous() : x->stride(1) == 1)) {
      Py_RETURN_NONE;
    }
    if (record && x->requires_grad()) inputs.wanted |= uint64_t(1) << b;
    logits.push_back(*x);
  }
  inputs.logits = logits;

  const at::Tensor* link = nullptr;
  if (link_object != Py_None) {
    link = plain(link_object);
    if (link == nullptr || link->device() != fused->device() || link->dim() != 1 ||
        link->size(0) != modalities || !link->is_floating_point() || !names_agree(unimodal, link_object)) {
      Py_RETURN_NONE;
    }
  } else if (inputs.wanted != 0 && options->rule != kNone) {
    Py_RETURN_NONE;  // a missing link: the general path says so
  }

  RECORD_FUNCTION("arl_fast::loss", c10::ArrayRef<const c10::IValue>());
  cpu::Outputs results;
  {
    const bool on_cuda = cuda::serves(*fused);
    std::optional<pybind11::gil_scoped_release> release;
    if (on_cuda || fused->numel() > 16384) release.emplace();
    std::optional<Flat> flat;
    if (dense) flat.emplace(&inputs, labels);
    if (on_cuda) {
      if constexpr (cuda::kBuilt) {
        variable_list grads;
        std::tie(results.loss, results.packed, grads) = cuda::forward(
            inputs.logits, inputs.targets, schedule, *options, inputs.wanted != 0, cuda::Memory::kShared);
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
      node->hooked = at::SavedTensorDefaultHooks::get_hooks().has_value();
      const bool has_link = link != nullptr && link->requires_grad();
      variable_list edges(logits.begin(), logits.end());
      edges.push_back(has_link ? *link : at::Tensor());
      node->set_next_edges(torch::autograd::collect_next_edges(edges));
      for (const at::Tensor& grad : results.grads) node->grads.emplace_back(grad, /*is_output=*/false);
      if (has_link) {
        node->link_dtype = link->scalar_type();
        node->link = part_of(results.packed, packed_offset<kPackedLink>(int(modalities)), {modalities});
      }
      torch::autograd::set_history(results.loss, node);
    }
  }
  return pair(THPVariable_Wrap(std::move(results.loss)), THPVariable_Wrap(std::move(results.packed)));
  END_HANDLE_TH_ERRORS
}

}  // namespace arl
