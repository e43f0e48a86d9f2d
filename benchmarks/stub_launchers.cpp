// Launchers (csrc/cuda/launch.h) that do nothing: what is left of a step is its host time
// (benchmarks/native_host.py).
#include "../csrc/cuda/launch.h"

namespace arl {
namespace cuda {

int forward_workspace_bytes(const ForwardArgs&, int64_t* bytes) {
  *bytes = 16384;
  return 0;
}
int forward(const ForwardArgs&, void*) { return 0; }
int scale(const ScaleArgs&, void*) { return 0; }
int modulate_backward(const ModulateArgs&, void*) { return 0; }
const char* error_string(int) { return "error"; }
bool is_capturing(void*) { return false; }

}  // namespace cuda
}  // namespace arl
