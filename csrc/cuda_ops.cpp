#include "cuda_ops.h"

#include <c10/core/DeviceGuard.h>

#include "cuda/launch.h"
#include "dtype.h"
#include "eager/inputs.h"

namespace arl::cuda {
namespace {

void check(int error) { TORCH_CHECK(error == 0, "arl_fast: CUDA: ", error_string(error)); }

// The arguments of a launch hold arrays of kMaxBranches.
void check_branches(size_t branches) {
  TORCH_CHECK(branches <= size_t(kMaxBranches), "arl_fast: got ", branches, " branches, expected at most ",
              kMaxBranches);
}

void* pointer_of(int64_t stream) { return reinterpret_cast<void*>(stream); }

// The same values with adjacent classes; a view where they are already.
at::Tensor with_adjacent_classes(const at::Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

}  // namespace

Results forward(const std::vector<at::Tensor>& logits, const Targets& targets, const Schedule& schedule,
                const Options& options, bool grad, int64_t stream, const std::optional<at::Tensor>& ticket) {
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
      grads.push_back(
          at::empty({args.rows, args.classes}, first.options().dtype(type == at::kHalf ? at::kFloat : type)));
      args.grads[b] = grads.back().mutable_data_ptr();
    }
  }

  at::Tensor labels = *targets.target;
  if (labels.is_floating_point()) {
    labels = with_adjacent_classes(labels.to(compute.dtype()));
    args.target_kind = kProbabilities;
  } else {
    args.target_kind = labels.scalar_type() == at::kInt ? kInt32 : kInt64;
  }
  args.target = labels.const_data_ptr();
  args.target_stride = labels.stride(0);
  if (targets.mask != nullptr) {
    args.mask = targets.mask->const_data_ptr<bool>();
    args.mask_row_stride = targets.mask->stride(0);
    args.mask_column_stride = targets.mask->stride(1);
  }
  const auto adjacent = [&](const at::Tensor* values, c10::ScalarType dtype) -> const void* {
    if (values == nullptr) return nullptr;
    held.push_back(values->to(dtype).contiguous());
    return held.back().const_data_ptr();
  };
  const c10::ScalarType compute_type = c10::typeMetaToScalarType(compute.dtype());
  args.weight = adjacent(targets.weight, compute_type);
  args.divisor = adjacent(targets.divisor, compute_type);
  const size_t modalities = logits.size() - 1,
               gammas = schedule.gamma == nullptr ? schedule.gammas.size() : 0;
  TORCH_CHECK_VALUE(schedule.gamma != nullptr || gammas == 1 || gammas == modalities, "gamma: got ", gammas,
                    " values, expected one, or one for each of the ", modalities, " modalities");
  args.schedule.gamma = adjacent(schedule.gamma, compute_type);
  args.schedule.gamma_stride = schedule.gamma != nullptr && schedule.gamma->dim() == 1 ? 1 : 0;
  args.schedule.temperature = adjacent(schedule.temperature, compute_type);
  args.schedule.step = static_cast<const int64_t*>(adjacent(schedule.step, at::kLong));
  for (size_t m = 0; m < modalities && gammas > 0; ++m) {
    args.schedule.gammas[m] = schedule.gammas[gammas == 1 ? 0 : m];
  }
  args.schedule.temperature_number = schedule.temperature_number;
  args.schedule.warmup = schedule.warmup;
  args.options = options;

  at::Tensor loss =
      options.reduction == kNoReduction ? at::empty({args.rows}, compute) : at::empty({}, compute);
  at::Tensor packed = at::empty({packed_length(args.branches - 1)}, compute);
  args.loss = loss.mutable_data_ptr();
  args.packed = packed.mutable_data_ptr();
  const at::Tensor workspace = at::empty({forward_workspace_bytes(args)}, compute.dtype(at::kByte));
  args.workspace = workspace.mutable_data_ptr();
  args.ticket = ticket ? reinterpret_cast<unsigned*>(ticket->mutable_data_ptr<int32_t>()) : nullptr;
  check(forward(args, pointer_of(stream)));
  return {std::move(loss), std::move(packed), std::move(grads)};
}

std::vector<at::Tensor> scale(const std::vector<at::Tensor>& grads, const at::Tensor& upstream,
                              const std::optional<at::Tensor>& factor, at::ScalarType dtype, bool reuse,
                              int64_t stream) {
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
    scaled.push_back(reuse && first.scalar_type() == dtype
                         ? grads[b]
                         : at::empty(grads[b].sizes(), first.options().dtype(dtype)));
    args.grads[b] = grads[b].const_data_ptr();
    args.out[b] = scaled.back().mutable_data_ptr();
  }
  const at::Tensor own = upstream.to(compute);
  args.upstream = own.const_data_ptr();
  args.per_row = own.dim() == 1;
  args.upstream_stride = args.per_row ? own.stride(0) : 0;
  const at::Tensor factors = factor ? factor->to(compute).contiguous() : at::Tensor();
  args.factor = factor ? factors.const_data_ptr() : nullptr;
  check(scale(args, pointer_of(stream)));
  return scaled;
}

std::vector<at::Tensor> modulate_backward(const std::vector<at::Tensor>& grads, const at::Tensor& link,
                                          const std::vector<int64_t>& modality, int64_t stream) {
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
      check(modulate_backward(args, pointer_of(stream)));
      args.count = 0;
    }
  }
  return modulated;
}

namespace {

using pybind11::handle;
using Tensors = std::vector<at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

Results forward_from_python(const Tensors& logits, handle targets, handle schedule, handle options, bool grad,
                            int64_t stream, const MaybeTensor& ticket) {
  const Arguments arguments(targets.ptr(), schedule.ptr(), options.ptr());
  const pybind11::gil_scoped_release release;
  return forward(logits, arguments.targets, arguments.schedule, arguments.options, grad, stream, ticket);
}

Tensors scale_from_python(const Tensors& grads, const at::Tensor& upstream, const MaybeTensor& factor,
                          at::ScalarType dtype, bool keep, int64_t stream) {
  const pybind11::gil_scoped_release release;
  return scale(grads, upstream, factor, dtype, !keep, stream);
}

Tensors modulate_backward_from_python(const Tensors& grads, const at::Tensor& link,
                                      const std::vector<int64_t>& modality, int64_t stream) {
  const pybind11::gil_scoped_release release;
  return modulate_backward(grads, link, modality, stream);
}

}  // namespace

void define(pybind11::module_& module) {
  module.def("cuda_forward", &forward_from_python);
  module.def("cuda_scale", &scale_from_python);
  module.def("cuda_modulate_backward", &modulate_backward_from_python);
}

}  // namespace arl::cuda
