// Host side of the forward launch.
#include <limits>

#include "forward.cuh"

namespace arl {
namespace cuda {

namespace {

bool is_dense(const ForwardArgs& args) {
  return args.target_kind == kProbabilities || (args.weight != nullptr && args.options.label_smoothing > 0);
}

int make_plan(const ForwardArgs& args, Plan& plan) {
  if (args.branches < 1 || args.branches > kMaxBranches || args.classes < 1 || args.rows < 0 ||
      args.classes >
          std::numeric_limits<int>::max() / 2) {  // a class index and a stride of threads fit in 32 bits
    return cudaErrorInvalidValue;
  }
  Device device;
  if (const int error = current_device(device)) return error;
  const bool known = args.divisor != nullptr || (args.target_kind == kProbabilities && args.mask == nullptr);
  const bool counts = args.grads[0] != nullptr && args.options.reduction == kMean && !known;
  const bool per_row_loss = args.options.reduction == kNoReduction;
  plan = arl::cuda::plan(
      {args.dtype, args.branches, args.rows, args.classes, is_dense(args), per_row_loss, counts}, device);
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
  const bool dense = is_dense(args);
  switch (args.dtype) {
    case kFloat64: return launch_forward<double>(args, plan, dense, stream);
    case kFloat32: return launch_forward<float>(args, plan, dense, stream);
    case kBFloat16: return launch_forward<__nv_bfloat16>(args, plan, dense, stream);
    case kFloat16: return launch_forward<__half>(args, plan, dense, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace arl
