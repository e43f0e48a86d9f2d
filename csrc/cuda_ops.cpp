#include "cuda_ops.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

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

// The current cudaStream_t of a tensor's device.
void* stream_of(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return nullptr;  // ARL_FAST_CUDA_ON_CPU
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  return guard.getStream(tensor.device()).native_handle();
}

// The same values with adjacent classes; a view where they are already.
at::Tensor with_adjacent_classes(const at::Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

constexpr int64_t kAlignment = 512;  // bytes between results that share an allocation

int64_t aligned_elements(int64_t elements, int64_t size) {
  return (elements * size + kAlignment - 1) / kAlignment * kAlignment / size;
}

// Uninitialised [rows, classes] for every branch.
std::vector<at::Tensor> empty_gradients(const at::TensorOptions& options, int branches, int64_t rows,
                                        int64_t classes, Memory memory) {
  std::vector<at::Tensor> gradients;
  gradients.reserve(branches);
  const int64_t step = aligned_elements(rows * classes, int64_t(options.dtype().itemsize()));
  at::Tensor all;
  if (memory == Memory::kShared) all = at::empty({branches * step}, options);
  for (int b = 0; b < branches; ++b) {
    gradients.push_back(all.defined() ? part_of(all, b * step, {rows, classes})
                                      : at::empty({rows, classes}, options));
  }
  return gradients;
}

}  // namespace

Results forward(at::TensorList logits, const Targets& targets, const Schedule& schedule,
                const Options& options, bool grad, Memory memory) {
  check_branches(logits.size());
  const at::Tensor& first = logits[0];
  const c10::OptionalDeviceGuard guard(first.device());
  const at::ScalarType type = first.scalar_type();
  const at::ScalarType compute = type == at::kDouble ? at::kDouble : at::kFloat;
  const at::ScalarType grad_type = type == at::kHalf ? at::kFloat : type;

  ForwardArgs args{};
  args.dtype = dtype_of(type);
  args.branches = int(logits.size());
  args.rows = first.size(0);
  args.classes = first.size(1);
  c10::SmallVector<at::Tensor, 8> held;  // copies that must live until the launch is enqueued
  std::vector<at::Tensor> grads;
  if (grad) {
    grads = empty_gradients(first.options().dtype(grad_type), args.branches, args.rows, args.classes, memory);
  }
  for (size_t b = 0; b < logits.size(); ++b) {
    held.push_back(with_adjacent_classes(logits[b]));
    args.logits[b] = held.back().const_data_ptr();
    args.row_stride[b] = held.back().stride(0);
    if (grad) args.grads[b] = grads[b].mutable_data_ptr();
  }

  const bool multilabel = options.task == kMultilabel;
  TORCH_CHECK_VALUE(multilabel || targets.pos_weight == nullptr, "pos_weight: expected None without labels");
  at::Tensor labels = *targets.target;
  TORCH_CHECK_TYPE(!multilabel || labels.is_floating_point(), "target: expected labels of floating point");
  if (labels.is_floating_point()) {
    labels = with_adjacent_classes(labels.to(compute));
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
    if (values->scalar_type() == dtype && values->is_contiguous()) return values->const_data_ptr();
    held.push_back(values->to(dtype).contiguous());
    return held.back().const_data_ptr();
  };
  args.weight = adjacent(targets.weight, compute);
  args.pos_weight = adjacent(targets.pos_weight, compute);
  args.divisor = adjacent(targets.divisor, compute);
  const size_t modalities = logits.size() - 1, gammas = schedule.gammas.size();
  TORCH_CHECK_VALUE(schedule.gamma != nullptr || gammas == 1 || gammas == modalities, "gamma: got ", gammas,
                    " values, expected one, or one for each of the ", modalities, " modalities");
  args.schedule.gamma = adjacent(schedule.gamma, compute);
  args.schedule.gamma_stride = schedule.gamma != nullptr && schedule.gamma->dim() == 1 ? 1 : 0;
  args.schedule.temperature = adjacent(schedule.temperature, compute);
  args.schedule.step = static_cast<const int64_t*>(adjacent(schedule.step, at::kLong));
  for (size_t m = 0; m < modalities && schedule.gamma == nullptr; ++m) {
    args.schedule.gammas[m] = schedule.gammas[gammas == 1 ? 0 : m];
  }
  args.schedule.temperature_number = schedule.temperature_number;
  args.schedule.warmup = schedule.warmup;
  args.options = options;

  // The loss has memory of its own: who keeps it must not keep the workspace.
  c10::SmallVector<int64_t, 2> shape;
  if (options.reduction == kNoReduction) shape.push_back(args.rows);
  if (options.reduction == kNoReduction && multilabel) shape.push_back(args.classes);
  at::Tensor loss = at::empty(shape, first.options().dtype(compute));
  const int64_t size = int64_t(c10::elementSize(compute));
  const int64_t length = packed_length(args.branches - 1);
  int64_t workspace_bytes;
  check(forward_workspace_bytes(args, &workspace_bytes));
  const int64_t scratch = aligned_elements(workspace_bytes, 1) / size;
  at::Tensor packed, workspace;
  if (memory == Memory::kShared) {
    const int64_t first_of_scratch = aligned_elements(length, size);
    workspace = at::empty({first_of_scratch + scratch}, loss.options());
    packed = part_of(workspace, 0, {length});
    args.workspace = static_cast<char*>(workspace.mutable_data_ptr()) + first_of_scratch * size;
  } else {
    workspace = at::empty({scratch}, loss.options());
    packed = at::empty({length}, loss.options());
    args.workspace = workspace.mutable_data_ptr();
  }
  args.loss = loss.mutable_data_ptr();
  args.packed = packed.mutable_data_ptr();
  check(forward(args, stream_of(first)));
  return {std::move(loss), std::move(packed), std::move(grads)};
}

std::vector<at::Tensor> scale(at::TensorList grads, const at::Tensor& upstream,
                              const std::optional<at::Tensor>& factor, at::ScalarType dtype, bool reuse) {
  check_branches(grads.size());
  const at::Tensor& first = grads[0];
  const c10::OptionalDeviceGuard guard(first.device());
  const at::ScalarType compute = first.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  ScaleArgs args{};
  args.dtype = dtype_of(dtype);
  args.branches = int(grads.size());
  args.rows = first.size(0);
  args.classes = args.rows == 0 ? 0 : first.numel() / args.rows;
  const bool in_place = reuse && first.scalar_type() == dtype;
  std::vector<at::Tensor> scaled(grads.begin(), grads.end());
  if (!in_place) {
    for (at::Tensor& result : scaled) result = at::empty(result.sizes(), first.options().dtype(dtype));
  }
  for (size_t b = 0; b < grads.size(); ++b) {
    args.grads[b] = grads[b].const_data_ptr();
    args.out[b] = scaled[b].mutable_data_ptr();
  }
  at::Tensor own = upstream.scalar_type() == compute ? upstream : upstream.to(compute);
  if (own.dim() == 2) {  // of each pair of a row and a label: rows of one
    own = own.reshape({-1});
    args.rows *= args.classes;
    args.classes = 1;
  }
  args.upstream = own.const_data_ptr();
  args.per_row = own.dim() == 1;
  args.upstream_stride = args.per_row ? own.stride(0) : 0;
  const at::Tensor factors = factor ? factor->to(compute).contiguous() : at::Tensor();
  args.factor = factor ? factors.const_data_ptr() : nullptr;
  check(scale(args, stream_of(first)));
  return scaled;
}

std::vector<at::Tensor> modulate_backward(at::TensorList grads, at::IntArrayRef modalities,
                                          const at::Tensor& link, at::ArrayRef<char> reuse) {
  std::vector<at::Tensor> modulated;
  if (grads.empty()) return modulated;
  const c10::OptionalDeviceGuard guard(link.device());
  const at::Tensor values = link.contiguous();
  c10::SmallVector<at::Tensor, 8> held;
  modulated.reserve(grads.size());
  ModulateArgs args{};
  args.link = values.const_data_ptr();
  args.link_dtype = dtype_of(values.scalar_type());
  for (size_t i = 0; i < grads.size(); ++i) {
    held.push_back(grads[i].is_non_overlapping_and_dense() ? grads[i] : grads[i].contiguous());
    const at::Tensor& g = held.back();
    modulated.push_back(!reuse.empty() && reuse[i] ? g : at::empty_like(g));
    const int slot = args.count++;
    args.dtype[slot] = dtype_of(g.scalar_type());
    args.grads[slot] = g.const_data_ptr();
    args.out[slot] = modulated.back().mutable_data_ptr();
    args.size[slot] = g.numel();
    args.link_index[slot] = int(modalities[i]);
    if (args.count == kMaxTensors || i + 1 == grads.size()) {
      check(modulate_backward(args, stream_of(link)));
      args.count = 0;
    }
  }
  return modulated;
}

namespace {

using pybind11::handle;
using Tensors = std::vector<at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

Results forward_from_python(const Tensors& logits, handle targets, handle schedule, handle options,
                            bool grad) {
  const Arguments arguments(targets.ptr(), schedule.ptr(), options.ptr());
  const pybind11::gil_scoped_release release;
  return forward(logits, arguments.targets, arguments.schedule, arguments.options, grad, Memory::kOwn);
}

Tensors scale_from_python(const Tensors& grads, const at::Tensor& upstream, const MaybeTensor& factor,
                          at::ScalarType dtype, bool keep) {
  const pybind11::gil_scoped_release release;
  return scale(grads, upstream, factor, dtype, !keep);
}

// All results are contiguous, as the registered op says.
Tensors modulate_from_python(const Tensors& grads, const std::vector<int64_t>& modalities,
                             const at::Tensor& link) {
  const pybind11::gil_scoped_release release;
  Tensors contiguous;
  for (const at::Tensor& g : grads) contiguous.push_back(g.contiguous());
  return modulate_backward(contiguous, modalities, link);
}

}  // namespace

bool is_capturing(const at::Tensor& tensor) {
  const c10::OptionalDeviceGuard guard(tensor.device());
  return is_capturing(stream_of(tensor));
}

void define(pybind11::module_& module) {
  module.def("cuda_forward", &forward_from_python);
  module.def("cuda_scale", &scale_from_python);
  module.def("cuda_modulate_backward", &modulate_from_python);
}

}  // namespace arl::cuda
