// What the calls from Python share: how their arguments are read, which calls are usual, and what their
// autograd nodes need.
#pragma once

#include <ATen/ATen.h>
#include <Python.h>
#include <torch/csrc/autograd/function.h>

#include <initializer_list>
#include <memory>
#include <type_traits>

#include "../contract.h"
#include "../parts.h"

namespace arl {

// torch keeps nodes in shared_ptr up to 2.12 or so and in intrusive_ptr from then on; an edge knows which.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class T>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<T>();
  } else {
    return c10::make_intrusive<T>();
  }
}

// ---- arguments of any call -------------------------------------------------------------------------------

// Position of a Python string in a list of names, or -1.
int position(PyObject* text, const char* const* names, int count);

// The Options of a tuple in the order of kOptionFields, or null, as for a callable rule.
const Options* options_of(PyObject* object);

// Which Python classes of tensors are read: torch's own, or its subclasses too.
enum class Classes { kOwn, kAll };

// The items of a tuple of this many, borrowed; null for anything else.
PyObject* const* items_of(PyObject* object, size_t count);

// From the fields of the NamedTuples of Python, whose tensors are borrowed; false for anything else.
bool read_targets(PyObject* const* fields, Classes classes, Targets* targets);
bool read_schedule(PyObject* const* fields, Classes classes, Schedule* schedule);

// What one call of forward is given besides the logits; a TypeError if it is not what the contract says.
struct Arguments {
  Targets targets;
  Schedule schedule;
  Options options;

  Arguments(PyObject* targets, PyObject* schedule, PyObject* options);
};

// ---- usual calls -----------------------------------------------------------------------------------------

// Whether no mode intercepts operations: functorch, FakeTensor, tracing, torch-function modes, forward-mode
// AD.
bool no_mode_intercepts();

// A dense tensor of torch's own class, on a CPU or with CUDA, or null.
const at::Tensor* plain(PyObject* object);

bool is_float(at::ScalarType type);

// The values, borrowed, of a dict, list or tuple; none if it is something else.
c10::SmallVector<PyObject*, 8> values_of(PyObject* object);

// Whether targets and schedule are legal and usual for M+1 logits of a shape, [rows, classes] or for labels
// [B, C, d1, ...], like a tensor. False if anything is unusual, wrong, or served by another implementation.
bool is_usual(const Targets& targets, const Schedule& schedule, const Options& options, at::IntArrayRef shape,
              int64_t modalities, const at::Tensor& like);

// Whether the loss is a plain one, the baseline of every comparison: torch's own, to the last bit. As
// is_plain() in arl_fast/_core/options.py.
inline bool is_plain_loss(const Schedule& schedule, const Options& options) {
  const bool zero = schedule.gamma == nullptr && schedule.gammas.size() == 1 && schedule.gammas[0] == 0;
  return zero && options.rule == kNone && schedule.warmup == 0;
}

// ---- results and autograd nodes --------------------------------------------------------------------------

// An entry of a packed vector on a CPU.
double value_at(const at::Tensor& packed, int64_t position);

// The gains - 1 of a packed vector on a CPU.
c10::SmallVector<double, 4> link_gradient(const at::Tensor& packed, int modalities);

double read_scalar(const at::Tensor& tensor);

// Raises under create_graph: the gradients would pass for constants.
void refuse_second_derivatives();

// A new tuple of two objects, which it takes over; null if one is null.
PyObject* pair(PyObject* first, PyObject* second);

}  // namespace arl
