// The launches of task "multilabel", for all dtypes.
#include "labels.cuh"

namespace arl {
namespace cuda {

int forward_labels(const ForwardArgs& args, const Plan& plan, void* stream) {
  switch (args.dtype) {
    case kFloat64: return launch_labels<double>(args, plan, stream);
    case kFloat32: return launch_labels<float>(args, plan, stream);
    case kBFloat16: return launch_labels<__nv_bfloat16>(args, plan, stream);
    case kFloat16: return launch_labels<__half>(args, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace arl
