// What the calls from Python that serve a whole eager step share: which calls are usual, and what their autograd nodes need.
#pragma once

#include <ATen/ATen.h>
#include <Python.h>
#include <torch/csrc/autograd/function.h>

#include <initializer_list>
#include <memory>
#include <type_traits>

#include "cpu/forward.h"

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

// No mode that wants to see the operations: functorch, FakeTensor, tracing, torch-function modes, forward-mode AD.
bool nobody_watches();

// A dense CPU tensor of torch's own class, or null.
const at::Tensor* plain(PyObject* object);

bool is_float(at::ScalarType type);

// Position of a Python string in a list of names, or -1.
int position(PyObject* text, std::initializer_list<const char*> names);

// The options.Options of Python, or null for a callable rule.
const Options* options_of(PyObject* object);

// The values, borrowed, of a dict, list or tuple; none if it is something else.
c10::SmallVector<PyObject*, 8> values_of(PyObject* object);

// What comes with logits [rows, classes] of a type: the target, and rest = mask, weight, gamma, temperature, warming.
// False if anything is unusual, wrong, or served by another implementation.
bool read_inputs(PyObject* target, PyObject* const* rest, const Options& options, int64_t rows, int64_t classes, int64_t modalities,
                 at::ScalarType type, cpu::Inputs* inputs);

// Whether the loss is a plain cross-entropy, the baseline of every comparison: it is torch's own, to the last bit.
inline bool is_plain(const cpu::Inputs& inputs, const Options& options) { return inputs.gamma == 0 && options.rule == kNone; }

// An entry of a packed vector.
double value_at(const at::Tensor& packed, int64_t position);

// The gains - 1 of a packed vector.
c10::SmallVector<double, 4> link_gradient(const at::Tensor& packed, int modalities);

double read_scalar(const at::Tensor& tensor);

// Raises under create_graph: the gradients would pass for constants.
void refuse_second_derivatives();

// A new tuple of two objects, which it takes over; null if one is null.
PyObject* pair(PyObject* first, PyObject* second);

}  // namespace arl
