// Host side of the forward launch.
#include <limits>

#include "forward.cuh"

namespace arl {
namespace cuda {

// Instantiated in forward_*.cu.
template <>
int launch_forward<double>(const Plan&, const ForwardParams&, bool, void*);
template <>
int launch_forward<float>(const Plan&, const ForwardParams&, bool, void*);
template <>
int launch_forward<__nv_bfloat16>(const Plan&, const ForwardParams&, bool, void*);
template <>
int launch_forward<__half>(const Plan&, const ForwardParams&, bool, void*);

namespace {

bool wants_gradients(const ForwardArgs& args) { return args.grads[0] != nullptr; }

int make_plan(const ForwardArgs& args, Plan& plan) {
  if (args.branches < 1 || args.branches > kMaxBranches || args.classes < 1 || args.rows < 0 ||
      args.classes > std::numeric_limits<int>::max() / 2) {  // a class index and a stride of threads fit in 32 bits
    return cudaErrorInvalidValue;
  }
  Device device;
  if (const int error = current_device(device)) return error;
  const bool known = args.norm != nullptr || (args.target_kind == kProbabilities && args.mask == nullptr);
  const bool counts = wants_gradients(args) && args.options.reduction == kMean && !known;
  plan = arl::cuda::plan({args.dtype, args.branches, args.rows, args.classes, args.options.reduction == kNoReduction, counts}, device);
  return cudaSuccess;
}

}  // namespace

int64_t forward_workspace_bytes(const ForwardArgs& args) {
  Plan plan;
  return make_plan(args, plan) == cudaSuccess ? plan.workspace_bytes : 0;
}

int forward(const ForwardArgs& args, void* stream) {
  Plan plan;
  if (const int error = make_plan(args, plan)) return error;
  ForwardParams params;
  params.args = args;
  char* workspace = static_cast<char*>(args.workspace);
  params.ticket = args.ticket;
  params.partials = workspace + kTicketBytes;
  params.norms = workspace + kTicketBytes + int64_t(kSums) * args.branches * plan.grid_x * compute_size(args.dtype);
  params.count_blocks = plan.count_blocks;
  params.threads_per_row = plan.threads_per_row;
  params.shared_vectors = plan.shared_vectors;
  params.grad = wants_gradients(args);
  if (params.ticket == nullptr) {
    params.ticket = reinterpret_cast<unsigned*>(workspace);
    const cudaError_t error = cudaMemsetAsync(workspace, 0, sizeof(unsigned), static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  if (plan.count_blocks > 0) {
    const auto kernel = args.dtype == kFloat64 ? count_kernel<double> : count_kernel<float>;
    const int error = launch<ForwardParams>(kernel, dim3(plan.count_blocks, args.branches), kRowsThreads, 0, stream, params);
    if (error != cudaSuccess) return error;
  }
  const bool dense = args.target_kind == kProbabilities || (args.weight != nullptr && args.options.label_smoothing > 0);
  switch (args.dtype) {
    case kFloat64: return launch_forward<double>(plan, params, dense, stream);
    case kFloat32: return launch_forward<float>(plan, params, dense, stream);
    case kBFloat16: return launch_forward<__nv_bfloat16>(plan, params, dense, stream);
    case kFloat16: return launch_forward<__half>(plan, params, dense, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace arl
