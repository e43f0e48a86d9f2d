#include "forward.cuh"

namespace arl {
namespace cuda {

ARL_INSTANTIATE_FORWARD(double)

}  // namespace cuda
}  // namespace arl
