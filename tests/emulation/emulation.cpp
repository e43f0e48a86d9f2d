// The CUDA sources as a shared library for ctypes. Compiled with -include cuda_emulation.h.
#include "../../csrc/cuda/backward.cu"
#include "../../csrc/cuda/forward.cu"
#include "../../csrc/cuda/forward_bf16.cu"
#include "../../csrc/cuda/forward_f16.cu"
#include "../../csrc/cuda/forward_f32.cu"
#include "../../csrc/cuda/forward_f64.cu"
#include "../../csrc/cuda/labels.cu"

using namespace arl::cuda;

extern "C" {

int64_t emulated_workspace_bytes(const ForwardArgs* args) {
  int64_t bytes;
  return forward_workspace_bytes(*args, &bytes) == 0 ? bytes : -1;
}
int emulated_forward(const ForwardArgs* args) { return forward(*args, nullptr); }
int emulated_scale(const ScaleArgs* args) { return scale(*args, nullptr); }
int emulated_modulate(const ModulateArgs* args) { return modulate_backward(*args, nullptr); }

void plan_of(const Shape* shape, const Device* device, Plan* result) { *result = plan(*shape, *device); }

// Sizes of the structures, so that their ctypes mirrors cannot drift unnoticed.
int size_of(int which) {
  const int sizes[] = {sizeof(ForwardArgs), sizeof(ScaleArgs), sizeof(ModulateArgs),
                       sizeof(Shape),       sizeof(Device),    sizeof(Plan)};
  return sizes[which];
}

void set_seed(uint64_t seed) {
  emulation::state().random.state = seed * 2862933555777941757ull + 3037000493ull;
}
static void set_properties(const emulation::Properties& properties) {
  auto& s = emulation::state();
  const auto found = std::find(s.devices.begin(), s.devices.end(), properties);
  s.device = int(found - s.devices.begin());
  if (found == s.devices.end()) s.devices.push_back(properties);
}
void set_device(int multiprocessors, int shared_memory) {
  set_properties({multiprocessors, shared_memory, false});
}
void set_device_with_clusters(int multiprocessors, int shared_memory) {
  set_properties({multiprocessors, shared_memory, true});
}
// What tests turn: captures, failing queries, kernels that have not asked for shared memory; and the last
// error.
void set_capturing(bool capturing) { emulation::state().capturing = capturing; }
void fail_queries(int count) { emulation::state().failing_queries = count; }
void fail_launches(int count) { emulation::state().failing_launches = count; }
void forget_opt_ins() { emulation::state().opted_in.clear(); }
int last_error() { return emulation::state().last_error; }
// The place of the counter that a launch on this stream would get, or -1.
int64_t ticket_of(int64_t stream) {
  static unsigned* first = nullptr;
  unsigned* ticket = nullptr;
  if (take_ticket(reinterpret_cast<void*>(stream), &ticket) != 0 || ticket == nullptr) return -1;
  if (first == nullptr) first = ticket;
  return *ticket == 0 ? ticket - first : -2;
}
bool needs_opt_in_of(int dynamic_bytes) { return needs_opt_in(dynamic_bytes); }
int64_t launches() { return emulation::state().launches; }
int64_t memsets() { return emulation::state().memsets; }

}  // extern "C"
