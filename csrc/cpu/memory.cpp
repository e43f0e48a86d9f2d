#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace arl::cpu {
namespace {

constexpr size_t kLarge = size_t(1) << 20;     // smaller blocks are malloc's business
constexpr size_t kPage = size_t(2) << 20;      // a huge page
constexpr size_t kKeep = size_t(2) << 30;      // most bytes kept for later
std::atomic<size_t> kept_bytes{0};

struct Block {
  void* memory;
  size_t bytes;
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
  if (c10::memoryProfilingEnabled()) c10::reportMemoryUsageToProfiler(block.memory, change, 0, 0, c10::Device(c10::kCPU));
}

void give_back(void* context) {
  Block* block = static_cast<Block*>(context);
  tell_profiler(*block, -int64_t(block->bytes));
  {
    std::lock_guard<std::mutex> guard(lock());
    if (kept_bytes + block->bytes <= kKeep) {
      kept().push_back(*block);
      kept_bytes += block->bytes;
      block->memory = nullptr;
    }
  }
  std::free(block->memory);
  delete block;
}

Block take(size_t bytes) {
  {
    std::lock_guard<std::mutex> guard(lock());
    auto& blocks = kept();
    for (size_t i = blocks.size(); i-- > 0;) {
      if (blocks[i].bytes == bytes) {
        const Block block = blocks[i];
        blocks.erase(blocks.begin() + i);
        kept_bytes -= bytes;
        return block;
      }
    }
  }
  release_kept_memory();  // the shapes have changed: what is kept would not be asked for again
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
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

at::Tensor& fill_if_asked(at::Tensor& tensor) {
  auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) tensor.fill_(NAN);
  return tensor;
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor tensor = at::detail::empty_cpu(sizes, dtype);
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

void release_kept_memory() {
  if (kept_bytes == 0) return;
  std::vector<Block> blocks;
  {
    std::lock_guard<std::mutex> guard(lock());
    blocks.swap(kept());
    kept_bytes = 0;
  }
  for (const Block& block : blocks) std::free(block.memory);
}

int64_t kept_memory() { return int64_t(kept_bytes.load()); }

}  // namespace arl::cpu
