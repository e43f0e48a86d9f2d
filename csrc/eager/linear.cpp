// Linear head and loss in one call for usual eager steps on a CPU; the equations are those of
// arl_fast/_autograd/linear.py.
//
// Forward: x_m = z_m W_m^T + b_m and x_f for all branches into one buffer [M+1, N, C]; the loss overwrites
// them by their gradients g, which become t_m = g_f + g_m. Backward: dz_m = u gain_m t_m W_m and dW_m = u
// t_m^T z_m, where u is the upstream gradient; db needs no product and is summed in forward. Nothing that is
// saved is written again.
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <iterator>
#include <mutex>

#include "../cpu/forward.h"
#include "../cpu/memory.h"
#include "inputs.h"
#include "steps.h"

namespace arl {
namespace {

using torch::autograd::any_variable_requires_grad;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

constexpr int64_t kProductsWithGil =
    1 << 22;  // most multiplications in forward that other Python threads wait for

// ---- products --------------------------------------------------------------------------------------------

// The same values without gaps: torch's product of bfloat16 would copy columns of a wider matrix element by
// element.
at::Tensor dense(const at::Tensor& x) {
  return x.stride(0) < x.stride(1) ? x.t().contiguous().t() : x.contiguous();
}

// out = factor a b, or += unless `first`.
void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double factor, bool first) {
  const bool half = out.scalar_type() == at::kBFloat16;
  out.addmm_(half ? dense(a) : a, half ? dense(b) : b, first ? 0 : 1, factor == 0 ? 1 : factor);
  if (factor == 0)
    out.mul_(0);  // a product times 0 may be 0 without a look at a and b, but NaN has to stay NaN
}

// ---- the head --------------------------------------------------------------------------------------------

// The tensors as given: M features [N, D_m]; one weight matrix [C, sum D_m], [C, D] or M of them; no bias,
// one [C], or M.
struct Head {
  int fusion;
  bool full;  // "concat", and every branch gets the whole bias once
  variable_list features, weights, biases;

  int64_t modalities() const { return int64_t(features.size()); }
  int64_t rows() const { return features[0].size(0); }
  int64_t classes() const { return weights[0].size(0); }
};

// Appends what may be a tensor of dim dimensions; false if it is anything else.
bool append(PyObject* object, int64_t dim, at::ScalarType type, variable_list* tensors) {
  const at::Tensor* x = plain(object);
  if (x == nullptr || !x->is_cpu() || x->dim() != dim || x->scalar_type() != type) return false;
  tensors->push_back(*x);
  return true;
}

// One tensor, or as many as there are modalities in a list or tuple (a dict need not come in the features'
// order).
bool append_all(PyObject* object, bool one, int64_t modalities, int64_t dim, at::ScalarType type,
                variable_list* tensors) {
  if (one) return append(object, dim, type, tensors);
  if (PyDict_Check(object)) return false;
  const auto values = values_of(object);
  if (int64_t(values.size()) != modalities) return false;
  for (PyObject* value : values) {
    if (!append(value, dim, type, tensors)) return false;
  }
  return true;
}

// The fields of LinearHead (arl_fast/_core/checks.py), but for the chunk.
enum HeadField : int { kFeatures, kWeights, kBias, kFusion, kBiasMode, kChunk, kHeadFields };

// False if anything is unusual or wrong.
bool read_head(PyObject* object, Head* head) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != kHeadFields) return false;
  PyObject* weights = PyTuple_GET_ITEM(object, kWeights);
  PyObject* bias = PyTuple_GET_ITEM(object, kBias);
  const int mode = position(PyTuple_GET_ITEM(object, kBiasMode), kBiasModes, length_of(kBiasModes));
  head->fusion = position(PyTuple_GET_ITEM(object, kFusion), kFusions, length_of(kFusions));
  head->full = head->fusion == kConcat && mode == kFull;
  if (head->fusion < 0 || mode < 0) return false;
  const auto values = values_of(PyTuple_GET_ITEM(object, kFeatures));
  const int64_t modalities = int64_t(values.size());
  const at::Tensor* first = modalities > 0 ? plain(values[0]) : nullptr;
  if (first == nullptr) return false;
  const at::ScalarType type = first->scalar_type();
  if (!first->is_cpu()) return false;
  if (type == at::kHalf) return false;  // its gradients must not be rounded before the loss scale is known
  int64_t columns = 0;
  for (PyObject* value : values) {
    if (!append(value, 2, type, &head->features)) return false;
    const at::Tensor& z = head->features.back();
    if (z.size(0) != first->size(0) || z.size(1) == 0) return false;
    columns += z.size(1);
  }
  const bool one = head->fusion == kShared || (head->fusion == kConcat && THPVariable_Check(weights));
  if (!append_all(weights, one, modalities, 2, type, &head->weights)) return false;
  if (bias != Py_None && !append_all(bias, head->fusion != kSumFusion, modalities, 1, type, &head->biases))
    return false;
  for (int64_t m = 0; m < modalities; ++m) {
    const at::Tensor& w = head->weights[one ? 0 : m];
    const bool whole = one && head->fusion == kConcat;
    if (w.size(0) != head->classes() || w.size(1) != (whole ? columns : head->features[m].size(1)))
      return false;
  }
  for (const at::Tensor& b : head->biases) {
    if (b.size(0) != head->classes()) return false;
  }
  return true;
}

// Whether each modality has a matrix of its own.
bool own_matrices(size_t weights, int fusion, size_t modalities) {
  return weights == modalities && fusion != kShared;
}

// W_m [C, D_m] for each modality: its own, the shared one, or columns of one. So also for their gradients.
variable_list by_modality(const variable_list& weights, int fusion, at::IntArrayRef dims) {
  if (own_matrices(weights.size(), fusion, dims.size())) return weights;
  if (fusion == kShared) return variable_list(dims.size(), weights[0]);
  return weights[0].split_with_sizes(dims, 1);
}

c10::SmallVector<int64_t, 4> sizes_of(const variable_list& features) {
  c10::SmallVector<int64_t, 4> sizes;
  for (const at::Tensor& z : features) sizes.push_back(z.size(1));
  return sizes;
}

// All logits into x [M+1, N, C], the fused ones first. A bias is there before the product that is added to
// it, which so rounds once.
void make_logits(const Head& head, const at::Tensor& x) {
  const int64_t modalities = head.modalities();
  const variable_list weights = by_modality(head.weights, head.fusion, sizes_of(head.features));
  const variable_list branches = x.unbind(0);
  variable_list own(modalities);
  if (head.full && !head.biases.empty()) {
    own[0] = head.biases[0];  // so that the sum of the parts has it once
  } else if (!head.biases.empty()) {
    const at::Tensor one = head.fusion == kConcat ? head.biases[0].div(double(modalities)) : head.biases[0];
    own = head.fusion == kSumFusion ? head.biases : variable_list(modalities, one);
  }
  for (int64_t m = 0; m < modalities; ++m) {
    at::Tensor out = branches[m + 1];
    if (own[m].defined()) out.copy_(own[m]);
    multiply(out, head.features[m], weights[m].t(), 1, !own[m].defined());
  }
  at::Tensor fused = branches[0];
  if (modalities == 1) {
    fused.copy_(branches[1]);
  } else {
    at::add_out(fused, branches[1], branches[2]);
    for (int64_t m = 2; m < modalities; ++m) fused.add_(branches[m + 1]);
  }
  if (head.full && !head.biases.empty() && modalities > 1)
    x.narrow(0, 2, modalities - 1).add_(head.biases[0]);
}

// ---- backward --------------------------------------------------------------------------------------------

struct LinearLossBackward final : Node {
  int fusion;
  at::ScalarType type;
  int64_t classes;
  c10::SmallVector<int64_t, 4> sizes;  // D_m
  c10::SmallVector<double, 4> gains;
  c10::SmallVector<SavedVariable, 4> features, weights;  // each only where a product of backward reads it
  SavedVariable totals;                                  // t [M, N, C]
  SavedVariable bias_sums;  // db of u = 1, in the compute type: [1, C], or [M, C] for fusion "sum"
  size_t biases;

  std::string name() const override { return "ARLLinearLossBackward"; }

  variable_list apply(variable_list&& upstreams) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t modalities = sizes.size();
    variable_list results(modalities + weights.size() + biases);
    if (!upstreams[0].defined()) return results;
    refuse_second_derivatives();
    const double upstream = read_scalar(upstreams[0]);
    const size_t end = modalities + weights.size();
    const bool some_features = task_should_compute_output({{0, modalities}});
    const bool some_weights = task_should_compute_output({{modalities, end}});
    const bool some_biases = task_should_compute_output({{end, end + biases}});
    const bool own = own_matrices(weights.size(), fusion, modalities);

    variable_list w(weights.size()), z(modalities), t;
    at::Tensor db;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (own ? task_should_compute_output(i) : some_features) w[i] = weights[i].unpack();
    }
    for (size_t m = 0; m < modalities; ++m) {
      if (task_should_compute_output(modalities + (own ? m : 0))) z[m] = features[m].unpack();
    }
    if (some_features || some_weights) t = totals.unpack().unbind(0);
    if (some_biases) db = bias_sums.unpack();

    const at::AutoDispatchBelowADInplaceOrView guard;
    if (some_features) {
      w = by_modality(w, fusion, sizes);
      for (size_t m = 0; m < modalities; ++m) {
        if (!task_should_compute_output(m)) continue;
        results[m] = cpu::empty_gradient(t[m].size(0), sizes[m], type);
        multiply(results[m], t[m], w[m], upstream * gains[m], true);
      }
    }
    if (some_weights) weight_gradients(t, z, upstream, &results);
    for (size_t i = 0; i < biases; ++i) {
      if (task_should_compute_output(end + i)) results[end + i] = db[int64_t(i)].mul(upstream).to(type);
    }
    return results;
  }

  void weight_gradients(const variable_list& t, const variable_list& z, double upstream,
                        variable_list* results) {
    const size_t modalities = sizes.size();
    // the products of a shared matrix are added up in the compute type
    const at::ScalarType sum_type = fusion == kShared && type == at::kBFloat16 ? at::kFloat : type;
    variable_list whole(weights.size());
    for (size_t i = 0; i < whole.size(); ++i) {
      if (!task_should_compute_output(modalities + i)) continue;
      int64_t columns = sizes[i];
      if (whole.size() < modalities && fusion == kConcat) columns = c10::sum_integers(sizes);
      whole[i] = cpu::empty_gradient(classes, columns, sum_type);
    }
    const variable_list parts = by_modality(whole, fusion, sizes);
    for (size_t m = 0; m < modalities; ++m) {
      if (!parts[m].defined()) continue;
      const bool first = m == 0 || fusion != kShared;
      if (sum_type == type) {
        multiply(parts[m], t[m].t(), z[m], upstream, first);
      } else {
        at::Tensor product = at::empty(parts[m].sizes(), t[m].options());
        multiply(product, t[m].t(), z[m], upstream, true);
        at::Tensor out = parts[m];
        first ? out.copy_(product) : out.add_(product);
      }
    }
    for (size_t i = 0; i < whole.size(); ++i) {
      if (whole[i].defined()) (*results)[modalities + i] = whole[i].to(type);
    }
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& x : features) x.reset_data();
    for (SavedVariable& x : weights) x.reset_data();
    totals.reset_data();
    bias_sums.reset_data();
  }
};

// The node behind a loss whose gradients g [M+1, N, C] are done; g is overwritten.
void attach(const Head& head, at::Tensor g, cpu::Outputs* outputs) {
  const int64_t modalities = head.modalities();
  const bool of_features = any_variable_requires_grad(head.features);
  const bool of_weights = any_variable_requires_grad(head.weights);
  const bool of_biases = any_variable_requires_grad(head.biases);
  at::Tensor t, db;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::ScalarType compute = outputs->packed.scalar_type();
    t = g.narrow(0, 1, modalities);
    if (of_biases && head.full) db = at::sum(g, at::IntArrayRef({0, 1}), false, compute).unsqueeze(0);
    t.add_(g[0]);
    if (of_biases && !head.full) {
      db = head.fusion == kSumFusion ? at::sum(t, at::IntArrayRef({1}), false, compute)
                                     : at::sum(t, at::IntArrayRef({0, 1}), false, compute).unsqueeze(0);
      if (head.fusion == kConcat) db.div_(double(modalities));
    }
  }
  const auto node = make_node<LinearLossBackward>();
  node->fusion = head.fusion;
  node->type = g.scalar_type();
  node->classes = head.classes();
  node->sizes = sizes_of(head.features);
  node->gains = link_gradient(outputs->packed, int(modalities));
  for (double& gain : node->gains) gain += 1;
  node->biases = head.biases.size();
  variable_list edges = head.features;
  edges.insert(edges.end(), head.weights.begin(), head.weights.end());
  edges.insert(edges.end(), head.biases.begin(), head.biases.end());
  node->set_next_edges(torch::autograd::collect_next_edges(edges));
  const bool own = own_matrices(head.weights.size(), head.fusion, head.features.size());
  for (size_t m = 0; m < head.features.size(); ++m) {
    const bool read = head.weights[own ? m : 0].requires_grad();
    node->features.emplace_back(read ? head.features[m] : at::Tensor(), /*is_output=*/false);
  }
  for (size_t i = 0; i < head.weights.size(); ++i) {
    const bool read = own ? head.features[i].requires_grad() : of_features;
    node->weights.emplace_back(read ? head.weights[i] : at::Tensor(), /*is_output=*/false);
  }
  if (of_features || of_weights) node->totals = SavedVariable(t, /*is_output=*/false);
  if (of_biases) node->bias_sums = SavedVariable(db, /*is_output=*/false);
  torch::autograd::set_history(outputs->loss, node);
}

// Whether `chunk` rows, or where it is None as many as fit the budget in bytes, are all rows.
bool one_chunk(PyObject* chunk, PyObject* budget, int64_t rows, int64_t bytes_per_row) {
  if (chunk != Py_None)
    return PyLong_CheckExact(chunk) && PyLong_AsLongLong(chunk) >= std::max<int64_t>(rows, 1);
  return rows <= std::max<int64_t>(1, PyLong_AsLongLong(budget) / bytes_per_row);
}

}  // namespace

PyObject* fast_linear_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != Py_ssize_t(std::size(kFastLinearLoss)) || !no_mode_intercepts() ||
      at::autocast::is_autocast_enabled(at::kCPU)) {
    Py_RETURN_NONE;
  }
  const Options* options = options_of(args[0]);
  Head head;
  if (options == nullptr || !read_head(args[1], &head)) Py_RETURN_NONE;
  const int64_t modalities = head.modalities(), rows = head.rows(), classes = head.classes();
  const at::ScalarType type = head.features[0].scalar_type();
  cpu::Inputs inputs;
  Schedule schedule;
  PyObject* const* targets = items_of(args[2], std::size(kTargetsFields));
  PyObject* const* numbers = items_of(args[3], std::size(kScheduleFields));
  if (targets == nullptr || numbers == nullptr || !read_targets(targets, Classes::kOwn, &inputs.targets) ||
      !read_schedule(numbers, Classes::kOwn, &schedule) ||
      !is_usual(inputs.targets, schedule, *options, {rows, classes}, modalities, head.features[0])) {
    Py_RETURN_NONE;
  }
  inputs.numbers = cpu::read(schedule);
  if (is_plain_loss(schedule, *options)) Py_RETURN_NONE;
  const int64_t bytes_per_row = (modalities + 1) * classes * 2 * int64_t(c10::elementSize(type));
  if (!one_chunk(PyTuple_GET_ITEM(args[1], kChunk), args[4], rows, bytes_per_row)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const bool record = at::GradMode::is_enabled() &&
                      (any_variable_requires_grad(head.features) ||
                       any_variable_requires_grad(head.weights) || any_variable_requires_grad(head.biases));

  RECORD_FUNCTION("arl_fast::linear_loss", c10::ArrayRef<const c10::IValue>());
  cpu::Outputs outputs;
  {
    std::optional<pybind11::gil_scoped_release> release;
    if (rows * classes * c10::sum_integers(sizes_of(head.features)) > kProductsWithGil) release.emplace();
    at::Tensor x;
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const int64_t all_rows = (modalities + 1) * rows;
      x = record ? cpu::empty_gradient(all_rows, classes, type) : cpu::empty({all_rows, classes}, type);
      x = x.view({modalities + 1, rows, classes});
      make_logits(head, x);
      const variable_list logits = x.unbind(0);
      for (const at::Tensor& own : logits) inputs.logits.push_back(&own);
      inputs.wanted = record ? ~uint64_t(0) : 0;
      inputs.in_place = true;
      outputs = cpu::forward(inputs, *options);
      outputs.grads.clear();
    }
    if (record) attach(head, std::move(x), &outputs);
  }
  return pair(THPVariable_Wrap(std::move(outputs.loss)), THPVariable_Wrap(std::move(outputs.packed)));
  END_HANDLE_TH_ERRORS
}

}  // namespace arl
