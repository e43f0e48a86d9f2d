#include "ops.h"

#include <torch/library.h>

#include "cpu/forward.h"

namespace arl {

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> forward(
    at::TensorList logits, const at::Tensor& target, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& norm,
    const std::optional<at::Tensor>& schedule, double gamma, double temperature, bool warming, const Options& options,
    bool grad) {
  cpu::Inputs inputs;
  inputs.logits = logits;
  inputs.target = &target;
  inputs.mask = mask ? &*mask : nullptr;
  inputs.weight = weight ? &*weight : nullptr;
  inputs.norm = norm ? &*norm : nullptr;
  inputs.gamma = gamma;
  inputs.temperature = temperature;
  inputs.warming = warming;
  inputs.wanted = grad ? ~uint64_t(0) : 0;
  if (schedule) {
    const at::Tensor values = schedule->to(at::kDouble).contiguous();
    const double* value = values.const_data_ptr<double>();
    inputs.gamma = value[0];
    inputs.temperature = value[1];
    inputs.warming = value[2] != 0;
  }
  cpu::Outputs outputs = cpu::forward(inputs, options);
  std::vector<at::Tensor> grads;
  if (grad) grads.assign(outputs.grads.begin(), outputs.grads.end());
  return {std::move(outputs.loss), std::move(outputs.packed), std::move(grads)};
}

std::vector<at::Tensor> scale(at::TensorList grads, const at::Tensor& upstream, const std::optional<at::Tensor>& factor,
                              at::ScalarType dtype, bool reuse) {
  std::vector<at::Tensor> scaled;
  scaled.reserve(grads.size());
  const bool scalar = upstream.dim() == 0;
  const double value = scalar ? upstream.item<double>() : 0;
  const at::Tensor column = scalar ? at::Tensor() : upstream.unsqueeze(1);
  const at::Tensor factors = factor ? factor->to(at::kDouble).contiguous() : at::Tensor();
  for (size_t b = 0; b < grads.size(); ++b) {
    const at::Tensor& g = grads[b];
    const double own = factor ? factors.const_data_ptr<double>()[b] : 1;
    const bool in_place = reuse && g.scalar_type() == dtype;
    if (scalar && value * own == 1 && in_place) {
      scaled.push_back(g);
    } else if (scalar) {
      scaled.push_back(in_place ? g.mul_(value * own) : g.mul(value * own).to(dtype));
    } else {
      scaled.push_back(g.to(upstream.scalar_type()).mul(own == 1 ? column : column * own).to(dtype));
    }
  }
  return scaled;
}

std::vector<at::Tensor> modulate_backward(at::TensorList grads, const at::Tensor& link, at::IntArrayRef modality) {
  const at::Tensor values = link.to(at::kDouble).contiguous();
  std::vector<at::Tensor> modulated;
  modulated.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) modulated.push_back(grads[i].mul(1 + values.const_data_ptr<double>()[modality[i]]));
  return modulated;
}

namespace {

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> forward_op(
    at::TensorList logits, const at::Tensor& target, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& norm,
    const std::optional<at::Tensor>& schedule, double gamma, double temperature, bool warming, int64_t rule,
    int64_t dependence, double entropy_floor, int64_t gain, int64_t ignore_index, double label_smoothing,
    int64_t reduction, bool grad) {
  const Options options{int(rule), int(dependence), int(gain), int(reduction), entropy_floor, label_smoothing, ignore_index};
  return forward(logits, target, mask, weight, norm, schedule, gamma, temperature, warming, options, grad);
}

std::vector<at::Tensor> scale_op(at::TensorList grads, const at::Tensor& upstream, const std::optional<at::Tensor>& factor,
                                 at::ScalarType dtype) {
  return scale(grads, upstream, factor, dtype, false);
}

}  // namespace

TORCH_LIBRARY(arl_fast, library) {
  library.def(
      "forward(Tensor[] logits, Tensor target, Tensor? mask, Tensor? weight, Tensor? norm, Tensor? schedule, float gamma, "
      "float temperature, bool warming, int rule, int dependence, float entropy_floor, int gain, int ignore_index, "
      "float label_smoothing, int reduction, bool grad) -> (Tensor loss, Tensor packed, Tensor[] grads)",
      {at::Tag::pt2_compliant_tag});
  library.def("scale(Tensor[] grads, Tensor upstream, Tensor? factor, ScalarType dtype) -> Tensor[]", {at::Tag::pt2_compliant_tag});
  library.def("modulate_backward(Tensor[] grads, Tensor link, int[] modality) -> Tensor[]", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(arl_fast, CPU, library) {
  library.impl("forward", &forward_op);
  library.impl("scale", &scale_op);
  library.impl("modulate_backward", &modulate_backward);
}

}  // namespace arl
