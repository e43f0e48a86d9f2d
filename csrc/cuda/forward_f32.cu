#include "forward.cuh"

namespace arl {
namespace cuda {

ARL_INSTANTIATE_FORWARD(float)

}  // namespace cuda
}  // namespace arl
