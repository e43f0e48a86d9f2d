#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace arl::cpu {
namespace {

constexpr size_t kSmall = 1 << 10;                  // larger ones may be worth an alignment
constexpr size_t kLarge = size_t(1) << 20;          // smaller blocks are malloc's business
constexpr size_t kPage = size_t(2) << 20;           // a huge page
constexpr size_t kKeep = size_t(2) << 30;           // most bytes kept for later
constexpr auto kUnused = std::chrono::seconds(60);  // longest time that a block is kept
std::atomic<size_t> kept_bytes{0};

using Clock = std::chrono::steady_clock;

struct Block {
  void* memory;
  size_t bytes;
  Clock::time_point freed = {};
};

std::mutex& lock() {
  static std::mutex* mutex = new std::mutex;  // never destroyed: tensors may be freed while the process ends
  return *mutex;
}

std::vector<Block>& kept() {
  static auto* blocks = new std::vector<Block>;
  return *blocks;
}

// As torch's own allocators do: what is kept for later is not in use.
void tell_profiler(const Block& block, int64_t change) {
  if (c10::memoryProfilingEnabled())
    c10::reportMemoryUsageToProfiler(block.memory, change, 0, 0, c10::Device(c10::kCPU));
}

void give_back(void* context) {
  Block* block = static_cast<Block*>(context);
  tell_profiler(*block, -int64_t(block->bytes));
  {
    std::lock_guard<std::mutex> guard(lock());
    if (kept_bytes + block->bytes <= kKeep) {
      block->freed = Clock::now();
      kept().push_back(*block);
      kept_bytes += block->bytes;
      block->memory = nullptr;
    }
  }
  std::free(block->memory);
  delete block;
}

// Gives back the kept blocks that `which` chooses.
template <class Which>
int64_t release(const Which& which) {
  if (kept_bytes == 0) return 0;
  std::vector<Block> chosen;
  int64_t bytes = 0;
  {
    std::lock_guard<std::mutex> guard(lock());
    auto& blocks = kept();
    const auto end = std::stable_partition(blocks.begin(), blocks.end(),
                                           [&](const Block& block) { return !which(block); });
    chosen.assign(end, blocks.end());
    blocks.erase(end, blocks.end());
    for (const Block& block : chosen) bytes += int64_t(block.bytes);
    kept_bytes -= size_t(bytes);
  }
  for (const Block& block : chosen) std::free(block.memory);
  return bytes;
}

// A kept block of the size or, as for the last batch of an epoch, of up to twice the size, the smallest; or a
// new one.
Block take(size_t bytes) {
  {
    std::lock_guard<std::mutex> guard(lock());
    auto& blocks = kept();
    size_t best = blocks.size();
    for (size_t i = blocks.size(); i-- > 0;) {
      const bool fits = blocks[i].bytes >= bytes && blocks[i].bytes / 2 <= bytes;
      if (fits && (best == blocks.size() || blocks[i].bytes < blocks[best].bytes)) best = i;
    }
    if (best < blocks.size()) {
      const Block block = blocks[best];
      blocks.erase(blocks.begin() + best);
      kept_bytes -= block.bytes;
      return block;
    }
  }
  release([bytes](const Block& block) { return block.bytes < bytes; });  // the shapes have grown
  release_unused_memory();
  void* memory = std::aligned_alloc(kPage, bytes);
  TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes for a gradient");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return {memory, bytes};
}

// The kept block goes through torch's allocator interface, so that the tensor is an ordinary one of its size.
struct LargeBlocks final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const Block block = take((bytes + kPage - 1) / kPage * kPage);
    tell_profiler(block, int64_t(block.bytes));
    return {block.memory, new Block(block), &give_back, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

// A few numbers need no alignment, and malloc serves them faster than posix_memalign, which torch calls.
struct SmallBlocks final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::malloc(bytes);
    TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes");
    return {memory, memory, &std::free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

at::Tensor& fill_if_asked(at::Tensor& tensor) {
  auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) tensor.fill_(NAN);
  return tensor;
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  static SmallBlocks small_blocks;
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  const bool small = size_t(c10::multiply_integers(sizes)) * c10::elementSize(dtype) < kSmall;
  at::Tensor tensor = small ? at::detail::empty_generic(sizes, &small_blocks, keys, dtype, std::nullopt)
                            : at::detail::empty_cpu(sizes, dtype);
  return fill_if_asked(tensor);
}

at::Tensor empty_gradient(int64_t rows, int64_t classes, at::ScalarType dtype) {
  static LargeBlocks large_blocks;
  const size_t bytes = size_t(rows) * size_t(classes) * c10::elementSize(dtype);
  at::Tensor gradient;
  if (bytes < kLarge) {
    gradient = at::detail::empty_cpu({rows, classes}, dtype);
  } else {
    constexpr c10::DispatchKeySet keys(c10::DispatchKey::CPU);
    gradient = at::detail::empty_generic({rows, classes}, &large_blocks, keys, dtype, std::nullopt);
  }
  return fill_if_asked(gradient);
}

int64_t release_memory() {
  return release([](const Block&) { return true; });
}

void release_unused_memory() {
  if (kept_bytes == 0) return;
  const Clock::time_point oldest = Clock::now() - kUnused;
  release([oldest](const Block& block) { return block.freed < oldest; });
}

int64_t kept_memory() { return int64_t(kept_bytes.load()); }

}  // namespace arl::cpu
