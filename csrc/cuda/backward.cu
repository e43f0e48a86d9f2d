// The launches of a backward pass: scale and modulate_backward. Also what is asked of the device.
#include <atomic>
#include <mutex>

#include "device.cuh"

namespace arl {
namespace cuda {

namespace {

__global__ void empty_kernel() {}

// Whether blocks can share rows: the device has clusters, and it runs code that was made for such devices.
// Code for sm_80 alone runs there too, compiled by the driver, and knows nothing of them.
cudaError_t has_clusters(int ordinal, bool* clusters) {
  int can = 0;
  cudaFuncAttributes code = {};
  cudaError_t error = cudaDeviceGetAttribute(&can, cudaDevAttrClusterLaunch, ordinal);
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(&empty_kernel));
  *clusters = can != 0 && code.ptxVersion >= 90;
  return error;
}

}  // namespace

int current_device(Device& device) {
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static std::atomic<bool> asked[kDevices];
  int ordinal = 0;
  if (const cudaError_t error = cudaGetDevice(&ordinal)) return without_trace(error);
  if (ordinal >= kDevices) return cudaErrorInvalidDevice;
  if (!asked[ordinal].load(std::memory_order_acquire)) {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    Device found = {};
    cudaError_t error =
        cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&found.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
    }
    if (error == cudaSuccess) error = has_clusters(ordinal, &found.clusters);
    if (error != cudaSuccess) return without_trace(error);  // the next call asks again
    known[ordinal] = found;
    asked[ordinal].store(true, std::memory_order_release);
  }
  device = known[ordinal];
  return cudaSuccess;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

namespace {

// out[i] = f(in[i], i), 16 bytes at a time on the narrower side; in place if out == in.
template <typename In, typename Out, typename F>
__device__ inline void transform(const In* in, Out* out, int64_t size, F f) {
  using C = typename Element<In>::Compute;
  constexpr int kN = kPerVector<In> > kPerVector<Out> ? kPerVector<In> : kPerVector<Out>;
  constexpr int kLoad = kPerVector<In>;
  const bool aligned = is_aligned(in) && is_aligned(out);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * kN;
  for (int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kN; first < size; first += step) {
    if (aligned && first + kN <= size) {
      C v[kN];
#pragma unroll
      for (int i = 0; i < kN; i += kLoad) {
        C part[kLoad];
        decode(load_vector(reinterpret_cast<const uint4*>(in + first + i)), part, In());
#pragma unroll
        for (int j = 0; j < kLoad; ++j) v[i + j] = part[j];
      }
#pragma unroll
      for (int i = 0; i < kN; ++i) v[i] = f(v[i], first + i);
      store(out + first, v, true);
    } else {
      for (int64_t i = first; i < size && i < first + kN; ++i) out[i] = Narrow<Out>::from(f(widen(in[i]), i));
    }
  }
}

template <typename In, typename Out, bool per_row>
__global__ void __launch_bounds__(kRowsThreads) scale_kernel(const __grid_constant__ ScaleArgs a) {
  using C = typename Element<In>::Compute;
  const int branch = blockIdx.y;
  const In* in = static_cast<const In*>(a.grads[branch]);
  Out* out = static_cast<Out*>(a.out[branch]);
  const C* upstream = static_cast<const C*>(a.upstream);
  const C factor = a.factor == nullptr ? C(1) : static_cast<const C*>(a.factor)[branch];
  const int64_t size = a.rows * a.classes;
  if constexpr (per_row) {
    const bool short_division = size <= 0xffffffffll;  // a 64-bit division costs several times as much
    transform(in, out, size, [&](C x, int64_t i) {
      const int64_t row = short_division ? int64_t(unsigned(i) / unsigned(a.classes)) : i / a.classes;
      return x * (upstream[row * a.upstream_stride] * factor);
    });
  } else {
    const C multiplier = upstream[0] * factor;
    if (static_cast<const void*>(in) == out && multiplier == C(1)) return;
    transform(in, out, size, [&](C x, int64_t) { return x * multiplier; });
  }
}

template <typename C, typename T>
__device__ inline void modulate_tensor(const ModulateArgs& a, int tensor, C gain) {
  transform(
      static_cast<const T*>(a.grads[tensor]), static_cast<T*>(a.out[tensor]), a.size[tensor],
      [&](typename Element<T>::Compute x, int64_t) { return typename Element<T>::Compute(C(x) * gain); });
}

template <typename C>
__global__ void __launch_bounds__(kRowsThreads) modulate_kernel(const __grid_constant__ ModulateArgs a) {
  const int tensor = blockIdx.y;
  const C gain = C(1) + static_cast<const C*>(a.link)[a.link_index[tensor]];
  switch (a.dtype[tensor]) {
    case kFloat64: return modulate_tensor<C, double>(a, tensor, gain);
    case kFloat32: return modulate_tensor<C, float>(a, tensor, gain);
    case kBFloat16: return modulate_tensor<C, __nv_bfloat16>(a, tensor, gain);
    default: return modulate_tensor<C, __half>(a, tensor, gain);
  }
}

template <typename In, typename Out>
int launch_scale(const ScaleArgs& args, dim3 grid, void* stream) {
  const auto kernel = args.per_row ? scale_kernel<In, Out, true> : scale_kernel<In, Out, false>;
  return launch<ScaleArgs>(kernel, grid, kRowsThreads, 0, stream, args);
}

}  // namespace

int scale(const ScaleArgs& args, void* stream) {
  if (args.branches < 1 || args.branches > kMaxBranches) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.classes == 0) return cudaSuccess;
  Device device;
  if (const int error = current_device(device)) return error;
  const dim3 grid(elementwise_blocks(args.rows * args.classes, args.dtype, args.branches, device),
                  args.branches);
  switch (args.dtype) {
    case kFloat64: return launch_scale<double, double>(args, grid, stream);
    case kFloat32: return launch_scale<float, float>(args, grid, stream);
    case kBFloat16: return launch_scale<__nv_bfloat16, __nv_bfloat16>(args, grid, stream);
    case kFloat16: return launch_scale<float, __half>(args, grid, stream);
  }
  return cudaErrorInvalidValue;
}

int modulate_backward(const ModulateArgs& args, void* stream) {
  if (args.count < 0 || args.count > kMaxTensors) return cudaErrorInvalidValue;
  Device device;
  if (const int error = current_device(device)) return error;
  int blocks = 0;
  for (int i = 0; i < args.count; ++i) {
    const int needed =
        args.size[i] == 0 ? 0 : elementwise_blocks(args.size[i], args.dtype[i], args.count, device);
    if (needed > blocks) blocks = needed;
  }
  if (blocks == 0) return cudaSuccess;
  const auto kernel = args.link_dtype == kFloat64 ? modulate_kernel<double> : modulate_kernel<float>;
  return launch<ModulateArgs>(kernel, dim3(blocks, args.count), kRowsThreads, 0, stream, args);
}

}  // namespace cuda
}  // namespace arl
