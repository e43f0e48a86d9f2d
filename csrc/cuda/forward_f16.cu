#include "forward.cuh"

namespace arl {
namespace cuda {

ARL_INSTANTIATE_FORWARD(__half)

}  // namespace cuda
}  // namespace arl
