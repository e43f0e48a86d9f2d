#include "forward.cuh"

namespace arl {
namespace cuda {

template int launch_forward<double>(const ForwardArgs&, const Plan&, bool, void*);

}  // namespace cuda
}  // namespace arl
