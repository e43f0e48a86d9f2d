// Enough of CUDA to run the kernels of csrc/cuda on a CPU, compiled as plain C++ after this header (g++
// -include).
//
// Blocks run one after the other, in random order. The threads of a block are fibers that switch only where
// CUDA threads wait for one another: at a barrier (all threads of the block) and at a shuffle (all lanes of
// the warp). Between two of those they run in random order, so a missing barrier shows as a wrong result.
// Static shared memory keeps what the block before left in it, and dynamic shared memory is filled with NaN
// before each block. The blocks of a cluster run at the same time, each in a thread of the host, whose
// thread-local variables are its shared memory.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

// ---- language --------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __noinline__  // after every standard header, where it is an attribute
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- 16-bit floating point, rounded to nearest even ------------------------------------------------------

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 a) {
  const uint32_t bits = uint32_t(a.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half a) {
  const int exponent = (a.bits >> 10) & 31, mantissa = a.bits & 1023;
  const float sign = a.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign *
         (exponent ? std::ldexp(float(1024 + mantissa), exponent - 25) : std::ldexp(float(mantissa), -24));
}
inline __half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float a = std::fabs(f);
  if (f != f) return {0x7fff};
  if (a == 0.0f) return {sign};
  if (a >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent;
  std::frexp(a, &exponent);
  exponent = std::max(exponent - 1, -14);  // a = m 2^(exponent - 10), m rounded to an integer below 2048
  const int mantissa = int(std::nearbyint(std::ldexp(a, 10 - exponent)));
  return {
      uint16_t(sign | (mantissa + ((exponent + 14) << 10)))};  // a carry into the exponent is the right one
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }

// ---- threads ---------------------------------------------------------------------------------------------

namespace emulation {

struct Random {  // xorshift
  uint64_t state = 88172645463325252ull;
  uint64_t operator()() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
};

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarpSize = 32;

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started, done;
  int waits_for;    // 0: nothing, 1: the warp, 2: the block, 3: the cluster
  unsigned parity;  // of the warp's exchange slots
  std::vector<std::pair<uint4*, const uint4*>> copies;  // begun and not waited for
  char* stack = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint64_t> slots;  // [2][threads]: what lanes exchange
  std::vector<uint4> dynamic;
  jmp_buf scheduler;
  int threads = 0, current = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  Random random;
  struct Cluster* cluster = nullptr;
  int rank = 0;
  ~Block() {
    for (const Fiber& f : fibers) {
      if (f.stack) munmap(f.stack, kStackBytes);
    }
  }
};

// The blocks of a cluster: where each keeps its thread-local variables, and their barrier.
struct Cluster {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<char*> anchors;
  int size, waiting = 0, round = 0;
  explicit Cluster(int size) : anchors(size), size(size) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const int own = round;
    if (++waiting == size) {
      waiting = 0;
      ++round;
      changed.notify_all();
    } else if (!changed.wait_for(lock, std::chrono::seconds(60), [&] { return round != own; })) {
      fprintf(stderr, "emulation: deadlock, a block of the cluster does not come to the barrier\n");
      abort();
    }
  }
};

struct Properties {
  int multiprocessors, shared_memory;
  bool clusters;
  bool operator==(const Properties& other) const {
    return multiprocessors == other.multiprocessors && shared_memory == other.shared_memory &&
           clusters == other.clusters;
  }
};

struct State {
  Random random;
  std::vector<Properties> devices = {{3, 232448, false}};  // callers may ask once per device
  int device = 0;
  int64_t launches = 0, memsets = 0;
  std::map<const void*, int> opted_in;  // kernels, and how much dynamic shared memory they asked for
  bool capturing = false;
  int failing_launches = 0;
  int failing_queries = 0;  // of the device's properties, from now on
  int last_error = 0;
};
inline State& state() {
  static State s;
  return s;
}

inline Block& block() {
  static thread_local Block b;
  return b;
}

inline thread_local dim3 thread_index, block_index;
inline dim3 block_dim, grid_dim;

// A fiber gives way and comes back when all it waits for have arrived.
inline void wait(int what) {
  Block& b = block();
  Fiber& self = b.fibers[b.current];
  self.waits_for = what;
  if (!_setjmp(self.resume)) _longjmp(b.scheduler, 1);
  thread_index = dim3(b.current);
}

inline void entry() {
  Block& b = block();
  thread_index = dim3(b.current);
  b.body(b.argument);
  b.fibers[b.current].done = true;
  _longjmp(b.scheduler, 1);
}

inline void run_fiber(int i) {
  Block& b = block();
  Fiber& f = b.fibers[i];
  b.current = i;
  f.waits_for = 0;
  if (_setjmp(b.scheduler)) return;
  if (f.started) _longjmp(f.resume, 1);
  f.started = true;
  setcontext(&f.start);
}

// Whether everybody from first to last waits for the same thing (or, at the block's barrier, has ended).
inline bool all_wait(int first, int last, int what) {
  Block& b = block();
  for (int i = first; i < last; ++i) {
    if (!(b.fibers[i].waits_for == what || (what >= 2 && b.fibers[i].done))) return false;
  }
  return true;
}

inline void run_block() {
  Block& b = block();
  if (int(b.fibers.size()) < b.threads) b.fibers.resize(b.threads);
  b.slots.assign(2 * b.threads, 0);
  std::fill(b.dynamic.begin(), b.dynamic.end(), make_uint4(~0u, ~0u, ~0u, ~0u));
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = b.fibers[i];
    if (!f.stack) {
      f.stack = static_cast<char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    }
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack;
    f.start.uc_stack.ss_size = kStackBytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
    f.started = f.done = false;
    f.waits_for = 0;
    f.parity = 0;
    f.copies.clear();
  }
  const int warps = b.threads / kWarpSize;
  for (;;) {
    bool ran = false;
    const int shift = int(b.random() % b.threads),
              stride = 2 * int(b.random() % 16) + 1;  // odd: visits every lane of a warp
    for (int n = 0; n < warps; ++n) {
      const int warp = (n + shift) % warps;
      const int first = warp * kWarpSize, last = first + kWarpSize;
      // A warp goes on until it waits for the block or has ended.
      for (;;) {
        bool progress = false;
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const int i = first + (lane * stride + shift) % kWarpSize;
          if (!b.fibers[i].done && b.fibers[i].waits_for == 0) {
            run_fiber(i);
            progress = true;
          }
        }
        if (all_wait(first, last, 1)) {
          for (int i = first; i < last; ++i) b.fibers[i].waits_for = 0;
          progress = true;
        }
        ran |= progress;
        if (!progress) break;
      }
    }
    if (!ran) {
      bool done = true;
      for (int i = 0; i < b.threads; ++i) done &= b.fibers[i].done;
      if (done) return;
      const bool together = b.cluster != nullptr && all_wait(0, b.threads, 3);
      if (!together && !all_wait(0, b.threads, 2)) {
        fprintf(stderr, "emulation: deadlock, threads wait for different things\n");
        abort();
      }
      if (together) b.cluster->wait();
      for (int i = 0; i < b.threads; ++i) b.fibers[i].waits_for = 0;
    }
  }
}

// An asynchronous copy arrives when its thread waits for it, not before.
inline void copy_later(uint4* to, const uint4* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) abort();
  Block& b = block();
  b.fibers[b.current].copies.emplace_back(to, from);
}
inline void finish_copies() {
  Block& b = block();
  auto& copies = b.fibers[b.current].copies;
  for (const auto& [to, from] : copies) *to = *from;
  copies.clear();
}

inline int cluster_rank() { return block().rank; }
inline void cluster_barrier() { wait(3); }

// A block's variable, in the shared memory of another block of its cluster.
template <typename V>
V* in_block(V* own, int rank) {
  Block& b = block();
  const auto& anchors = b.cluster->anchors;
  return reinterpret_cast<V*>(anchors[rank] + (reinterpret_cast<char*>(own) - anchors[b.rank]));
}

inline void touch(const char* address) {
  const volatile char* read = address;
  (void)*read;
}

template <typename Params>
struct Launch {
  void (*kernel)(Params);
  const Params* params;
  static void body(void* self) {
    Launch* launch = static_cast<Launch*>(self);
    launch->kernel(*launch->params);
  }
};

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_dim
#define gridDim emulation::grid_dim

inline void __syncthreads() { emulation::wait(2); }
inline void __syncwarp() { emulation::wait(1); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int lane_mask) {
  static_assert(sizeof(V) <= 8, "");
  emulation::Block& b = emulation::block();
  if (mask != 0xffffffffu) abort();
  const int i = b.current;
  const unsigned parity = b.fibers[i].parity++ & 1;
  memcpy(&b.slots[parity * b.threads + i], &value, sizeof(V));
  emulation::wait(1);
  memcpy(&value, &b.slots[parity * b.threads + (i ^ lane_mask)], sizeof(V));
  return value;
}

template <typename V>
V __ldg(const V* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(V)) abort();  // as the hardware would
  return *p;
}
template <typename V>
V __ldcg(const V* p) {
  return __ldg(p);
}

// ---- runtime ---------------------------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

inline cudaError_t failed(cudaError_t error) { return emulation::state().last_error = error; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::state().last_error;
  emulation::state().last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::state().device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  emulation::State& s = emulation::state();
  if (s.failing_queries > 0) {
    --s.failing_queries;
    return failed(cudaErrorInvalidDevice);
  }
  const emulation::Properties& own = s.devices[s.device];
  *value = attribute == cudaDevAttrMultiProcessorCount            ? own.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? own.shared_memory
                                                                  : own.clusters;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  emulation::State& s = emulation::state();
  if (bytes > s.devices[s.device].shared_memory) return failed(cudaErrorInvalidValue);
  s.opted_in[kernel] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::state().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
}
template <typename V>
cudaError_t cudaGetSymbolAddress(void** address, V& symbol) {
  *address = &symbol;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "error" : "no error"; }
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  memset(pointer, value, bytes);
  ++emulation::state().memsets;
  return cudaSuccess;
}

namespace arl {
namespace cuda {

inline uint4* dynamic_shared() { return emulation::block().dynamic.data(); }

template <typename Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, int cluster,
                          void*, Params& params) {
  constexpr int kStatic = 8192;  // as much static shared memory as any kernel may have
  emulation::State& s = emulation::state();
  if (s.failing_launches > 0) {
    --s.failing_launches;
    return failed(cudaErrorInvalidValue);
  }
  const auto opted_in = s.opted_in.find(reinterpret_cast<const void*>(kernel));
  const int most = opted_in == s.opted_in.end() ? 48 * 1024 - kStatic : opted_in->second;
  if (threads % emulation::kWarpSize || shared_bytes > most ||
      shared_bytes > s.devices[s.device].shared_memory || !grid.x || !grid.y || grid.y > 65535 ||
      cluster > 8 || grid.x % cluster) {
    return failed(cudaErrorInvalidValue);
  }
  ++s.launches;
  emulation::Launch<Params> launch{kernel, &params};
  emulation::block_dim = dim3(threads);
  emulation::grid_dim = grid;
  const auto run = [&](unsigned index, int rank, emulation::Cluster* together, uint64_t seed) {
    emulation::Block& b = emulation::block();
    b.threads = threads;
    b.body = emulation::Launch<Params>::body;
    b.argument = &launch;
    b.dynamic.resize(shared_bytes / sizeof(uint4));
    b.random.state = seed;
    b.cluster = together;
    b.rank = rank;
    if (together != nullptr) {
      together->anchors[rank] = reinterpret_cast<char*>(&b);
      together->wait();
    }
    emulation::block_index = dim3(index % grid.x, index / grid.x);
    emulation::run_block();
  };
  std::vector<unsigned> order(grid.x * grid.y / cluster);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[s.random() % i]);
  for (const unsigned i : order) {
    if (cluster == 1) {
      run(i, 0, nullptr, s.random());
      continue;
    }
    emulation::Cluster together(cluster);
    std::vector<std::thread> blocks;
    for (int rank = 0; rank < cluster; ++rank) {
      blocks.emplace_back(run, i * cluster + rank, rank, &together, s.random());
    }
    for (std::thread& block : blocks) block.join();
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace arl
