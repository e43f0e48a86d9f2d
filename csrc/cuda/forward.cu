// Host side of the forward launch.
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "forward.cuh"

namespace arl {
namespace cuda {

namespace {

bool is_dense(const ForwardArgs& args) {
  if (args.options.task == kMultilabel) return args.weight != nullptr || args.pos_weight != nullptr;
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
  const bool labels = args.options.task == kMultilabel;
  if (labels && args.target_kind != kProbabilities) return cudaErrorInvalidValue;
  const bool known = args.divisor != nullptr || (args.target_kind == kProbabilities && args.mask == nullptr && !labels);
  const bool counts = args.grads[0] != nullptr && args.options.reduction == kMean && !known;
  const bool per_row_loss = args.options.reduction == kNoReduction;
  const Shape shape = {args.dtype, args.branches, args.rows,   args.classes,
                       is_dense(args), per_row_loss,  counts};
  plan = labels ? labels_plan(shape, device) : arl::cuda::plan(shape, device);
  return cudaSuccess;
}

}  // namespace

namespace {

constexpr int kStreamTickets = 1024;
constexpr int kTickets = 1 << 16;
__device__ unsigned tickets[kTickets];  // zero from the start: those of streams first, then those of graphs

// The same for the whole life of a stream, and never that of another one.
cudaError_t stream_id(cudaStream_t stream, unsigned long long* id) {
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12000
  return cudaStreamGetId(stream, id);
#else
  *id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
#endif
}

}  // namespace

int take_ticket(void* stream_pointer, unsigned** ticket) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  *ticket = nullptr;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  int device = 0;
  cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error == cudaSuccess) error = stream_id(stream, &id);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error != cudaSuccess) return without_trace(error);

  static std::mutex mutex;
  static auto* slots = new std::map<std::pair<int, unsigned long long>, int>;  // of a device's streams
  static auto* used =
      new std::map<int, std::pair<int, int>>;  // of a device's tickets, by streams and by graphs
  static auto* arrays = new std::map<int, unsigned*>;
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned*& array = (*arrays)[device];
  if (array == nullptr) {
    void* address = nullptr;
    error = cudaGetSymbolAddress(&address, tickets);
    if (error != cudaSuccess) return without_trace(error);
    array = static_cast<unsigned*>(address);
  }
  auto& [by_streams, by_graphs] = (*used)[device];
  if (status != cudaStreamCaptureStatusNone) {
    if (by_graphs < kTickets - kStreamTickets) *ticket = array + kStreamTickets + by_graphs++;
    return cudaSuccess;
  }
  const auto found = slots->find({device, id});
  if (found != slots->end()) {
    *ticket = array + found->second;
  } else if (by_streams < kStreamTickets) {
    slots->emplace(std::make_pair(device, id), by_streams);
    *ticket = array + by_streams++;
  }
  return cudaSuccess;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return without_trace(error) != cudaSuccess || status != cudaStreamCaptureStatusNone;
}

int forward_workspace_bytes(const ForwardArgs& args, int64_t* bytes) {
  Plan plan;
  const int error = make_plan(args, plan);
  *bytes = error == cudaSuccess ? plan.workspace_bytes : 0;
  return error;
}

int forward(const ForwardArgs& args, void* stream) {
  Plan plan;
  if (const int error = make_plan(args, plan)) return error;
  if (args.options.task == kMultilabel) return forward_labels(args, plan, stream);
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
