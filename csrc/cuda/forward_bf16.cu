#include "forward.cuh"

namespace arl {
namespace cuda {

ARL_INSTANTIATE_FORWARD(__nv_bfloat16)

}  // namespace cuda
}  // namespace arl
