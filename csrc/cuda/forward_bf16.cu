#include "forward.cuh"

namespace arl {
namespace cuda {

template int launch_forward<__nv_bfloat16>(const ForwardArgs&, const Plan&, bool, void*);

}  // namespace cuda
}  // namespace arl
