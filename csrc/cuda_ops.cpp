#include "cuda_ops.h"

#include <c10/core/DeviceGuard.h>

#include "cuda/launch.h"
#include "dtype.h"

namespace arl::cuda {
namespace {

void check(int error) { TORCH_CHECK(error == 0, "arl_fast: CUDA: ", error_string(error)); }

// The arguments of a launch hold arrays of kMaxBranches.
void check_branches(size_t branches) {
  TORCH_CHECK(branches <= size_t(kMaxBranches), "arl_fast: got ", branches, " branches, expected at most ", kMaxBranches);
}

void* handle(int64_t stream) { return reinterpret_cast<void*>(stream); }

// The same values with adjacent classes; a view where they are already.
at::Tensor with_adjacent_classes(const at::Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> forward(
    const std::vector<at::Tensor>& logits, const at::Tensor& target, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& norm,
    const std::optional<at::Tensor>& schedule, double gamma, double temperature, bool warming, const Options& options,
    bool grad, int64_t stream, const std::optional<at::Tensor>& ticket) {
  check_branches(logits.size());
  const at::Tensor& first = logits[0];
  const c10::OptionalDeviceGuard guard(first.device());
  const at::ScalarType type = first.scalar_type();
  const at::TensorOptions compute = first.options().dtype(type == at::kDouble ? at::kDouble : at::kFloat);

  ForwardArgs args{};
  args.dtype = dtype_of(type);
  args.branches = int(logits.size());
  args.rows = first.size(0);
  args.classes = first.size(1);
  std::vector<at::Tensor> held;  // copies that must live until the launch is enqueued
  std::vector<at::Tensor> grads;
  for (size_t b = 0; b < logits.size(); ++b) {
    held.push_back(with_adjacent_classes(logits[b]));
    args.logits[b] = held.back().const_data_ptr();
    args.row_stride[b] = held.back().stride(0);
    if (grad) {
      grads.push_back(at::empty({args.rows, args.classes}, first.options().dtype(type == at::kHalf ? at::kFloat : type)));
      args.grads[b] = grads.back().mutable_data_ptr();
    }
  }

  at::Tensor labels = target;
  if (target.is_floating_point()) {
    labels = with_adjacent_classes(target.to(compute.dtype()));
    args.target_kind = kProbabilities;
  } else {
    args.target_kind = target.scalar_type() == at::kInt ? kInt32 : kInt64;
  }
  args.target = labels.const_data_ptr();
  args.target_stride = labels.stride(0);
  if (mask) {
    args.mask = mask->const_data_ptr<bool>();
    args.mask_row_stride = mask->stride(0);
    args.mask_column_stride = mask->stride(1);
  }
  const auto adjacent = [&](const std::optional<at::Tensor>& values) -> const void* {
    if (!values) return nullptr;
    held.push_back(values->to(compute.dtype()).contiguous());
    return held.back().const_data_ptr();
  };
  args.weight = adjacent(weight);
  args.norm = adjacent(norm);
  args.schedule = adjacent(schedule);
  args.gamma = gamma;
  args.temperature = temperature;
  args.warming = warming;
  args.options = options;

  at::Tensor loss = options.reduction == kNoReduction ? at::empty({args.rows}, compute) : at::empty({}, compute);
  at::Tensor packed = at::empty({packed_length(args.branches - 1)}, compute);
  args.loss = loss.mutable_data_ptr();
  args.packed = packed.mutable_data_ptr();
  const at::Tensor workspace = at::empty({forward_workspace_bytes(args)}, compute.dtype(at::kByte));
  args.workspace = workspace.mutable_data_ptr();
  args.ticket = ticket ? reinterpret_cast<unsigned*>(ticket->mutable_data_ptr<int32_t>()) : nullptr;
  check(forward(args, handle(stream)));
  return {std::move(loss), std::move(packed), std::move(grads)};
}

std::vector<at::Tensor> scale(const std::vector<at::Tensor>& grads, const at::Tensor& upstream, const std::optional<at::Tensor>& factor,
                              at::ScalarType dtype, bool reuse, int64_t stream) {
  check_branches(grads.size());
  const at::Tensor& first = grads[0];
  const c10::OptionalDeviceGuard guard(first.device());
  const at::ScalarType compute = first.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  ScaleArgs args{};
  args.dtype = dtype_of(dtype);
  args.branches = int(grads.size());
  args.rows = first.size(0);
  args.classes = first.size(1);
  std::vector<at::Tensor> scaled;
  for (size_t b = 0; b < grads.size(); ++b) {
    scaled.push_back(reuse && first.scalar_type() == dtype ? grads[b] : at::empty(grads[b].sizes(), first.options().dtype(dtype)));
    args.grads[b] = grads[b].const_data_ptr();
    args.out[b] = scaled.back().mutable_data_ptr();
  }
  const at::Tensor own = upstream.to(compute);
  args.upstream = own.const_data_ptr();
  args.per_row = own.dim() == 1;
  args.upstream_stride = args.per_row ? own.stride(0) : 0;
  const at::Tensor factors = factor ? factor->to(compute).contiguous() : at::Tensor();
  args.factor = factor ? factors.const_data_ptr() : nullptr;
  check(scale(args, handle(stream)));
  return scaled;
}

std::vector<at::Tensor> modulate_backward(const std::vector<at::Tensor>& grads, const at::Tensor& link, const std::vector<int64_t>& modality,
                                          int64_t stream) {
  std::vector<at::Tensor> held, modulated;
  if (grads.empty()) return modulated;
  const c10::OptionalDeviceGuard guard(link.device());
  const at::Tensor values = link.contiguous();
  ModulateArgs args{};
  args.link = values.const_data_ptr();
  args.link_dtype = dtype_of(values.scalar_type());
  for (size_t i = 0; i < grads.size(); ++i) {
    held.push_back(grads[i].contiguous());
    modulated.push_back(at::empty_like(held.back()));
    const int slot = args.count++;
    args.dtype[slot] = dtype_of(held.back().scalar_type());
    args.grads[slot] = held.back().const_data_ptr();
    args.out[slot] = modulated.back().mutable_data_ptr();
    args.size[slot] = held.back().numel();
    args.link_index[slot] = int(modality[i]);
    if (args.count == kMaxTensors || i + 1 == grads.size()) {
      check(modulate_backward(args, handle(stream)));
      args.count = 0;
    }
  }
  return modulated;
}

void define(pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("cuda_forward",
             pybind11::overload_cast<const std::vector<at::Tensor>&, const at::Tensor&, const std::optional<at::Tensor>&,
                                     const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                                     const std::optional<at::Tensor>&, double, double, bool, const Options&, bool, int64_t,
                                     const std::optional<at::Tensor>&>(&forward),
             without_gil);
  module.def("cuda_scale",
             pybind11::overload_cast<const std::vector<at::Tensor>&, const at::Tensor&, const std::optional<at::Tensor>&,
                                     at::ScalarType, bool, int64_t>(&scale),
             without_gil);
  module.def("cuda_modulate_backward",
             pybind11::overload_cast<const std::vector<at::Tensor>&, const at::Tensor&, const std::vector<int64_t>&, int64_t>(
                 &modulate_backward),
             without_gil);
}

}  // namespace arl::cuda
