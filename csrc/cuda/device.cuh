// What the kernels share: element types, 16-byte vectors, exponentials, reductions in a fixed order.
//
// Compiled by nvcc, or as plain C++ after an emulation of CUDA (tests/emulation/cuda_emulation.h), hence few
// intrinsics.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstring>

#include "launch.h"

namespace arl {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

int current_device(Device& device);  // properties, asked for once per device

#if defined(__CUDACC__)
__device__ inline uint4* dynamic_shared() {
  extern __shared__ uint4 arl_dynamic_shared[];
  return arl_dynamic_shared;
}

template <typename Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, int cluster,
                          void* stream, Params& params) {
  void* arguments[] = {&params};
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (cluster == 1) {
    return cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes, on);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = on;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, function, arguments);
}
#endif

// CUDA keeps an error until somebody asks, and would blame it on the next call of anybody.
inline int without_trace(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <typename Params>
int launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, void* stream, Params params,
           int cluster = 1) {
  cudaError_t error = cudaSuccess;
  if (needs_opt_in(shared_bytes)) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    error = launch_kernel(kernel, grid, threads, shared_bytes, cluster, stream, params);
  }
  return without_trace(error);
}

// ---- arithmetic ------------------------------------------------------------------------------------------

__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }
// As in hardware: a NaN operand loses. A NaN logit still shows, in the sum of exponentials.
__device__ inline float maximum(float a, float b) { return fmaxf(a, b); }
__device__ inline double maximum(double a, double b) { return fmax(a, b); }
__device__ inline int minimum(int a, int b) { return a < b ? a : b; }
__device__ inline float absolute(float a) { return fabsf(a); }
__device__ inline double absolute(double a) { return fabs(a); }

// e^a as 2^(a log2 e), for a <= 0. (Folding log2 e into the subtraction of the top, x log2 e - top log2 e,
// would save an instruction but leave the largest class off 1 by rounding: a certain prediction would have an
// entropy of noise.)
__device__ inline float exponential(float a) {
  const float exponent = a * 1.4426950408889634f;
#if defined(__CUDA_ARCH__)
  float
      result;  // one instruction; results below 2^-126 become 0, which no output can tell from what they were
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
#else
  return exp2f(exponent);
#endif
}
__device__ inline double exponential(double a) { return exp(a); }

// 1 / a for a sum of exponentials with a largest term of 1 (or NaN), to the last bit but one: an ordinary
// division has a branch for other operands, and around its call registers are short.
__device__ inline float reciprocal(float a) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return fmaf(result, fmaf(-a, result, 1.0f), result);
#else
  return 1.0f / a;
#endif
}
__device__ inline double reciprocal(double a) { return 1.0 / a; }

template <typename C>
struct Constants {
  static constexpr C lowest = C(-1e30);  // stands for log p = -inf where p = 0 multiplies it: 0 log 0 = 0
};

// ---- element types ---------------------------------------------------------------------------------------

template <typename T>
struct Element;  // compute type, type of the gradient, two words of -inf

template <>
struct Element<double> {
  using Compute = double;
  using Grad = double;
  static constexpr unsigned minus_infinity[2] = {0u, 0xfff00000u};
};
template <>
struct Element<float> {
  using Compute = float;
  using Grad = float;
  static constexpr unsigned minus_infinity[2] = {0xff800000u, 0xff800000u};
};
template <>
struct Element<__nv_bfloat16> {
  using Compute = float;
  using Grad = __nv_bfloat16;
  static constexpr unsigned minus_infinity[2] = {0xff80ff80u, 0xff80ff80u};
};
template <>
struct Element<__half> {
  using Compute = float;
  using Grad = float;
  static constexpr unsigned minus_infinity[2] = {0xfc00fc00u, 0xfc00fc00u};
};

__device__ inline double widen(double a) { return a; }
__device__ inline float widen(float a) { return a; }
__device__ inline float widen(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ inline float widen(__half a) { return __half2float(a); }

template <typename T>
struct Narrow;
template <>
struct Narrow<double> {
  __device__ static double from(double a) { return a; }
};
template <>
struct Narrow<float> {
  __device__ static float from(float a) { return a; }
};
template <>
struct Narrow<__nv_bfloat16> {
  __device__ static __nv_bfloat16 from(float a) { return __float2bfloat16_rn(a); }
};
template <>
struct Narrow<__half> {
  __device__ static __half from(float a) { return __float2half_rn(a); }
};

// ---- 16-byte vectors -------------------------------------------------------------------------------------

template <typename T>
constexpr int kPerVector = kVectorBytes / int(sizeof(T));

template <typename T>
__device__ inline bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

template <typename T>
__device__ inline uint4 padding_vector() {
  constexpr unsigned low = Element<T>::minus_infinity[0], high = Element<T>::minus_infinity[1];
  return make_uint4(low, high, low, high);
}

// By value, and word by word: of 16 bytes behind a pointer the compiler would load single bytes.
__device__ inline void decode(uint4 raw, double (&v)[2], double) {
  const uint64_t words[2] = {uint64_t(raw.y) << 32 | raw.x, uint64_t(raw.w) << 32 | raw.z};
#pragma unroll
  for (int i = 0; i < 2; ++i) memcpy(&v[i], &words[i], 8);
}
__device__ inline void decode(uint4 raw, float (&v)[4], float) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) memcpy(&v[i], &words[i], 4);
}
__device__ inline void decode(uint4 raw, float (&v)[8], __nv_bfloat16) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // a bfloat16 is the upper half of a float
    const unsigned low = words[i] << 16, high = words[i] & 0xffff0000u;
    memcpy(&v[2 * i], &low, 4);
    memcpy(&v[2 * i + 1], &high, 4);
  }
}
__device__ inline void decode(uint4 raw, float (&v)[8], __half) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __half2 pair;
    memcpy(&pair, &words[i], 4);
    v[2 * i] = __half2float(pair.x);
    v[2 * i + 1] = __half2float(pair.y);
  }
}

// Makes the compiler forget what it knows of a value, so that it unpacks a vector again in each pass over a
// row instead of keeping 8 floats in the place of 4 registers; and, without a value, finish what it has begun
// before it loads more.
__device__ inline void forget(uint4& raw) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
#else
  (void)raw;
#endif
}
__device__ inline void finish_loads() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// 16 bytes of results of type G, from v[first] on.
template <int n>
__device__ inline uint4 encode(const double (&v)[n], int first, double) {
  uint4 raw;
  memcpy(&raw, v + first, kVectorBytes);
  return raw;
}
template <int n>
__device__ inline uint4 encode(const float (&v)[n], int first, float) {
  uint4 raw;
  memcpy(&raw, v + first, kVectorBytes);
  return raw;
}
template <int n>
__device__ inline uint4 encode(const float (&v)[n], int first, __nv_bfloat16) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v[first + 2 * i], v[first + 2 * i + 1]);
    memcpy(&words[i], &pair, 4);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
template <int n>
__device__ inline uint4 encode(const float (&v)[n], int first, __half) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(v[first + 2 * i], v[first + 2 * i + 1]);
    memcpy(&words[i], &pair, 4);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// In PTX, because the compiler would split a plain 16-byte access and share the parts with the branch for
// single elements. Not the read-only path of __ldg: the memory may be written in place.
__device__ inline uint4 load_vector(const uint4* in) {
#if defined(__CUDA_ARCH__)
  uint4 raw;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(in)
               : "memory");
  return raw;
#else
  return *in;
#endif
}
__device__ inline void store_vector(uint4* out, uint4 raw) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(out), "r"(raw.x), "r"(raw.y), "r"(raw.z),
               "r"(raw.w)
               : "memory");
#else
  *out = raw;
#endif
}

// 16 bytes from global to shared memory, without a register in between; they are there after
// wait_for_copies().
__device__ inline void copy_async(uint4* to, const uint4* from) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#elif defined(__CUDACC__)
  *to = *from;
#else
  emulation::copy_later(to, from);
#endif
}
// What this thread has copied can be read by this thread.
__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::finish_copies();
#endif
}

// The 128 bytes around an address will be wanted from L2.
__device__ inline void prefetch_line(const char* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#elif !defined(__CUDACC__)
  emulation::touch(address);
#endif
}

// n results to adjacent addresses: 16 bytes at a time where the address allows it.
template <typename G, typename C, int n>
__device__ inline void store(G* out, const C (&v)[n], bool aligned) {
  if (aligned) {
#pragma unroll
    for (int i = 0; i < n; i += kPerVector<G>)
      store_vector(reinterpret_cast<uint4*>(out + i), encode(v, i, G()));
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) out[i] = Narrow<G>::from(v[i]);
  }
}

// ---- reductions: butterflies, so that every thread has the result and the order is fixed -----------------

struct Add {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Maximum {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return maximum(a, b);
  }
};
struct Larger {  // as in arl::finish
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return larger(a, b);
  }
};
struct Minimum {
  __device__ int operator()(int a, int b) const { return minimum(a, b); }
};

// Over groups of `lanes` (a power of two) adjacent lanes of a warp, all of whose lanes take part.
template <int n, typename V, typename Op>
__device__ inline void reduce_lanes(V (&v)[n], int lanes, Op op) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = op(v[i], __shfl_xor_sync(kAllLanes, v[i], offset));
  }
}

template <int n, typename V, typename Op>
__device__ inline void reduce_warp(V (&v)[n], Op op) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = op(v[i], __shfl_xor_sync(kAllLanes, v[i], offset));
  }
}

// Over the block, with one barrier. The buffer [n, 32] may be used again after any later barrier of the
// block.
template <int n, typename V, typename Op>
__device__ inline void reduce_block(V (&v)[n], V* buffer, V identity, Op op) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  reduce_warp(v, op);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) buffer[i * 32 + warp] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = lane < warps ? buffer[i * 32 + lane] : identity;
  reduce_warp(v, op);
}

// ---- clusters: blocks that share a row -------------------------------------------------------------------

// Which block of its cluster this is; 0 without a cluster.
__device__ inline int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#elif !defined(__CUDACC__)
  return emulation::cluster_rank();
#else
  return 0;
#endif
}

// Waits for all threads of the cluster; what they have written is visible then.
__device__ inline void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::cluster_barrier();
#endif
}

// Writes to a variable in the shared memory of a block of the cluster; `own` is this block's.
template <typename V>
__device__ inline void store_in_block(V* own, int rank, V value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(unsigned(__cvta_generic_to_shared(own))), "r"(rank));
  if constexpr (sizeof(V) == 8) {
    unsigned long long bits;
    memcpy(&bits, &value, 8);
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(bits) : "memory");
  } else {
    unsigned bits;
    memcpy(&bits, &value, 4);
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
  }
#elif !defined(__CUDACC__)
  *emulation::in_block(own, rank) = value;
#endif
}

// Over the blocks of a cluster, of values that all threads of a block have. Each block sends its own to all,
// so that one barrier suffices. The buffer [n, kMostCluster] may be used again after the cluster's next
// barrier.
template <int n, typename V, typename Op>
__device__ inline void reduce_cluster(V (&v)[n], int cluster, V* buffer, Op op) {
  if (int(threadIdx.x) < cluster) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      store_in_block(buffer + i * kMostCluster + cluster_rank(), int(threadIdx.x), v[i]);
    }
  }
  cluster_barrier();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    v[i] = buffer[i * kMostCluster];
    for (int rank = 1; rank < cluster; ++rank) v[i] = op(v[i], buffer[i * kMostCluster + rank]);
  }
}

// The threads of a warp as the team of arl::finish.
struct Warp {
  __device__ int first() const { return threadIdx.x % 32; }
  __device__ int step() const { return 32; }
  __device__ void sync() const { __syncwarp(); }
  template <typename T>
  __device__ T sum(T value) const {
    T v[1] = {value};
    reduce_warp(v, Add());
    return v[0];
  }
  template <typename T>
  __device__ T largest(T value) const {
    T v[1] = {value};
    reduce_warp(v, Larger());
    return v[0];
  }
};

// ---- the schedule ----------------------------------------------------------------------------------------

__device__ inline bool is_warming(const ScheduleArgs& s) {
  return (s.step == nullptr ? 0 : *s.step) < s.warmup;
}

template <typename C>
__device__ inline C gamma_of(const ScheduleArgs& s, int modality) {
  if (is_warming(s)) return C(1);
  if (s.gamma == nullptr) return C(s.gammas[modality]);
  return static_cast<const C*>(s.gamma)[modality * s.gamma_stride];
}

template <typename C>
__device__ inline C temperature_of(const ScheduleArgs& s) {
  return s.temperature == nullptr ? C(s.temperature_number) : *static_cast<const C*>(s.temperature);
}

}  // namespace cuda
}  // namespace arl
