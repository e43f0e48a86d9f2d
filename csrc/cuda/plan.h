// Which kernel serves which shape: one pure function, written down once and tested without a GPU.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../finish.h"

namespace arl {
namespace cuda {

constexpr int element_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
constexpr int compute_size(int dtype) { return dtype == kFloat64 ? 8 : 4; }
// A loss scale must be applied before a gradient is rounded to float16, so gradients of float16 logits are
// float32.
constexpr int grad_dtype(int dtype) { return dtype == kFloat16 ? int(kFloat32) : dtype; }

// What the rule needs to know about a device.
struct Device {
  int multiprocessors;
  int shared_memory;  // bytes that one block may have at most (opt-in)
  bool clusters;      // blocks can be launched in clusters, which reach each other's shared memory (sm_90)
};

enum Family : int {
  kSmall = 0,  // 1 to 32 threads per row, up to kHeld elements each: many rows per block
  kWarp =
      1,  // one warp per row, up to held_vectors() 16-byte vectors per thread; not for heavy rows (see below)
  // One block per row, or a cluster of blocks: registers, then shared memory, then what is left is read
  // again.
  kBlock = 2,
};

constexpr int kHeld = 8;  // elements (kSmall) or vectors (kBlock) that a thread holds in registers
constexpr int kVectorBytes = 16;
constexpr int kRowsThreads = 256;      // block size of kSmall and kWarp
constexpr int kElementwiseBlocks = 8;  // of kRowsThreads, resident per multiprocessor
constexpr int kTicketBytes = 16;
constexpr int kMostCluster = 8;  // blocks of a cluster on any device that has clusters
// Of the next row of a block, so much is asked for ahead: what arrives while this row is worked on. All of
// the rows of all blocks would drive the gradients out of L2.
constexpr int kPrefetchBytes = 64 * 1024;
constexpr int kStaticShared = 8192;  // bound on the static shared memory of a kernel
constexpr int64_t kCountInlineRows = 8192;
constexpr int kCountBlocks = 64;
constexpr int kCountRowsPerBlock = 2048;

struct Shape {
  int dtype;
  int branches;
  int64_t rows;
  int64_t classes;
  bool dense;  // the target's distribution differs from class to class: class probabilities, smoothed class
               // weights; of labels: they have weights
  bool per_row_loss;  // reduction "none"
  bool counts;  // gradients have to be divided by a divisor that is not given and not known to be `rows`
};

struct Plan {
  int family;
  int threads;  // per block
  int threads_per_row;
  int rows_per_block;
  int grid_x;  // blocks over the rows, those of a cluster side by side, which loop ...
  int grid_y;  // ... over the branches; one for a per-row loss: a thread then adds up the branches of its
               // rows
  int shared_vectors;  // kBlock: vectors per thread kept in dynamic shared memory
  int cluster;         // kBlock: blocks that share a row, on neighbouring multiprocessors
  int count_blocks;    // 0: no counting launch
  int64_t workspace_bytes;
};

// Threads resident per multiprocessor: a kernel keeps to as many registers per thread as that leaves it of 64
// K. Heavy: float64, or a target's distribution that differs from class to class.
constexpr int resident_threads(int family, bool heavy) {
  return family == kSmall ? (heavy ? 512 : 768) : heavy ? 256 : 512;
}

// Vectors that a thread holds in registers, kSmall apart. The short rows of 16-bit types are unpacked at
// once.
constexpr int held_vectors(int element_size, int family) {
  return element_size == 2 && family == kWarp ? kHeld / 2 : kHeld;
}

// A kernel may have 48 KB of shared memory, static and dynamic together, without asking for more.
constexpr bool needs_opt_in(int dynamic_bytes) { return dynamic_bytes > 48 * 1024 - kStaticShared; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks over the rows in a persistent grid: no more than are resident at once, so that partial sums and
// counting stay few.
inline int persistent_blocks(int resident_threads, int64_t rows, const Plan& p, const Device& device) {
  int64_t resident =
      int64_t(device.multiprocessors) * (resident_threads / p.threads) / p.grid_y / p.cluster;
  const int64_t needed = ceil_div(rows, p.rows_per_block);
  if (resident > needed) resident = needed;
  return int(resident < 1 ? 1 : resident) * p.cluster;
}

// Ticket, then the partial sums [6, branches, grid_x], then the partial divisors [branches, count_blocks].
inline int64_t workspace_bytes(const Shape& shape, const Plan& p) {
  return kTicketBytes + int64_t(shape.branches) * compute_size(shape.dtype) *
                            (kSums * int64_t(p.grid_x) + p.count_blocks);
}

inline Plan plan(const Shape& shape, const Device& device) {
  Plan p = {};
  const int per_vector = kVectorBytes / element_size(shape.dtype);
  const int64_t vectors = shape.classes / per_vector;
  const bool heavy = shape.dense || shape.dtype == kFloat64;
  p.grid_y = shape.per_row_loss ? 1 : shape.branches;
  p.cluster = 1;
  if (shape.classes <= 32 * kHeld) {
    p.family = kSmall;
    p.threads = kRowsThreads;
    p.threads_per_row = 1;
    while (p.threads_per_row * kHeld < shape.classes) p.threads_per_row *= 2;
  } else if (!heavy && vectors <= 32 * held_vectors(element_size(shape.dtype), kWarp)) {
    p.family = kWarp;
    p.threads = kRowsThreads;
    p.threads_per_row = 32;
  } else {
    p.family = kBlock;
    // Enough threads to hold the row in registers; where there are too few rows to fill the device more
    // threads share a row, as long as each has a vector.
    const int64_t all_rows = shape.rows * p.grid_y;
    const int most = resident_threads(kBlock, heavy);
    for (const int threads : {64, 128, 256, 512}) {
      if (threads > most) break;
      p.threads = threads;
      const bool larger_helps =
          threads * 2 <= vectors && threads * 2 * all_rows <= device.multiprocessors * int64_t(most);
      if (int64_t(threads) * kHeld >= vectors && !larger_helps) break;
    }
    p.threads_per_row = p.threads;
    const int64_t room = (device.shared_memory - kStaticShared) / (int64_t(kVectorBytes) * p.threads);
    // A row that one multiprocessor cannot hold would be read three times: several hold it together.
    while (device.clusters && p.cluster < kMostCluster &&
           vectors > p.cluster * int64_t(p.threads) * (kHeld + room)) {
      p.cluster *= 2;
    }
    const int64_t beyond = ceil_div(vectors, int64_t(p.threads) * p.cluster) - kHeld;
    p.shared_vectors = int(beyond < 0 ? 0 : beyond < room ? beyond : room);
  }
  p.rows_per_block = p.threads / p.threads_per_row;
  p.grid_x = persistent_blocks(resident_threads(p.family, heavy), shape.rows, p, device);
  // Every block can count the targets itself, out of L2, as long as they are few; else one small launch does
  // it.
  if (shape.counts && shape.rows > kCountInlineRows) {
    const int64_t blocks = ceil_div(shape.rows, kCountRowsPerBlock);
    p.count_blocks = int(blocks < kCountBlocks ? blocks : kCountBlocks);
  }
  p.workspace_bytes = workspace_bytes(shape, p);
  return p;
}

// Threads resident per multiprocessor for the pairs of rows and labels: each holds 16 bytes of logits.
// A loss for each (reduction "none") of eight pairs with weights needs most registers.
constexpr int resident_pairs(int element_size, bool weighted, bool each) {
  if (element_size == 2) return !weighted ? 768 : each ? 256 : 512;
  return element_size == 4 ? 1024 : 512;
}

// Of task "multilabel": rows_per_block counts pairs, of which a thread takes one vector.
inline Plan labels_plan(const Shape& shape, const Device& device) {
  Plan p = {};
  const int64_t pairs = shape.rows * shape.classes;
  p.threads = kRowsThreads;
  p.threads_per_row = p.cluster = 1;
  p.rows_per_block = p.threads * kVectorBytes / element_size(shape.dtype);
  p.grid_y = shape.per_row_loss ? 1 : shape.branches;
  const int resident = resident_pairs(element_size(shape.dtype), shape.dense, shape.per_row_loss);
  p.grid_x = persistent_blocks(resident, pairs, p, device);
  // The labels are as many as the logits: to count the known ones takes a launch that fills the device.
  if (shape.counts && pairs > kCountInlineRows) {
    const int64_t blocks = ceil_div(pairs, kCountRowsPerBlock);
    const int64_t most = int64_t(device.multiprocessors) * kElementwiseBlocks;
    p.count_blocks = int(blocks < most ? blocks : most);
  }
  p.workspace_bytes = workspace_bytes(shape, p);
  return p;
}

// Blocks per tensor of an elementwise launch over several tensors: one vector per thread, or what fills the
// device.
inline int elementwise_blocks(int64_t size, int dtype, int tensors, const Device& device) {
  const int64_t needed = ceil_div(size, int64_t(kRowsThreads) * (kVectorBytes / element_size(dtype)));
  const int64_t resident = int64_t(device.multiprocessors) * kElementwiseBlocks / tensors;
  return int(needed < resident ? needed : resident < 1 ? 1 : resident);
}

}  // namespace cuda
}  // namespace arl
