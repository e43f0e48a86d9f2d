// What the row kernels of the CPU are given, and the table of them per instruction set. No torch headers
// here.
#pragma once

#include <cstdint>

#include "../finish.h"

#define ARL_ALWAYS inline __attribute__((always_inline))

namespace arl::cpu {

constexpr int kMaxBranches = 64;          // M+1; more modalities than this are served by the reference
constexpr int kChunkRows = 64;            // most rows of one unit of work
constexpr int64_t kChunkPairs = 4096;     // pairs of a row and a label of one unit of work
constexpr int64_t kNarrowClasses = 128;   // most whose gradients are written for several rows at a time
constexpr int64_t kColumnClasses = 1024;  // most that are read where the positions lie side by side
constexpr int64_t kSingleClasses = 4;     // up to here logits are read and written one by one
constexpr int kMostLanes = 16;

// One call of the loss: M+1 branches of [rows, classes], row after row in memory; the classes are labels if
// the task says so. Or of [batch, classes, positions], as logits [B, C, d1, ...] lie in memory, of which each
// position of each image is a row. T below is the compute type, double for float64 and float for all others.
// Gradients are contiguous, of the logits' type, but float for float16 logits. A gradient may lie exactly
// where its logits do: no logit is read again once its gradient is written.
struct Loss {
  int branches;
  int64_t rows, classes;
  Dtype dtype;
  int64_t positions;                 // d1 ..., or 0: row after row
  const void* logits[kMaxBranches];  // class stride 1, or `positions`
  int64_t row_stride[kMaxBranches];  // in elements; of the batch where there are positions
  void* grad[kMaxBranches];          // null: not wanted
  bool far;                          // logits and gradients are more than the cache of a core keeps
  bool streams;                      // the gradients are more than all caches keep
  double grad_scale[kMaxBranches];   // of the branch's term in the loss: gamma and the divisor of the mean

  const int32_t* target;    // [rows + kMostLanes], -1 where a row is ignored and behind the last one, or null
  const void* soft_target;  // T [rows, classes], contiguous, or null; a label that is NaN is not known
  bool all_known;           // no label is NaN
  const uint8_t* mask;      // [rows, modalities], or [batch, modalities] with positions, or null
  int64_t mask_row_stride, mask_stride;
  const void* weight;   // T [classes], or null
  double weight_total;  // their sum; the number of classes without
  double label_smoothing;
  bool logit_l1;  // the dependence is sum_c |x_c| instead of the confidence

  // T [classes + kMostLanes], behind the last label the first ones again, or null. The loss of a label t is
  // t yes_weight softplus(-x) + (1 - t) no_weight softplus(x).
  const void *yes_weight, *no_weight;

  void* row_loss;  // T [branches, rows], of labels [branches, rows, classes], for reduction "none", or null

  // Inlined always: a copy made for one instruction set must not serve another.
  ARL_ALWAYS bool present(int branch, int64_t row) const {
    if (branch == 0 || mask == nullptr) return true;
    if (positions > 0) row /= positions;
    return mask[row * mask_row_stride + (branch - 1) * mask_stride] != 0;
  }
  ARL_ALWAYS bool valid(int branch, int64_t row) const {
    return present(branch, row) && (soft_target != nullptr || target[row] >= 0);
  }
};

// What a chunk adds to the sums of its branch, by Sum. The row kernels leave kDivisor and kCount at 0: both
// are counted before (count_rows in forward.cpp).
struct ChunkSums {
  double of[kSums] = {};
};

// Rows [begin, end), at most kChunkRows, of one branch: their gradients, and their share of the sums.
// `scratch` has scratch_elements() elements of T, aligned to 64 bytes.
using RowsFn = void (*)(const Loss& loss, int branch, int64_t begin, int64_t end, void* scratch,
                        ChunkSums* sums);

constexpr int64_t scratch_elements(int64_t classes, bool columns) {
  const int64_t padded = (classes + kMostLanes - 1) / kMostLanes * kMostLanes;
  return padded * (columns || classes <= kNarrowClasses ? kMostLanes : 2);
}

// How many labels T of [begin, end), row by row, are known, or -1 if one lies outside of [0, 1].
using KnownFn = int64_t (*)(const void* labels, int64_t begin, int64_t end);

struct Isa {
  const char* name;
  RowsFn rows[kDtypes];
  RowsFn labels[kDtypes];  // begin and end count pairs, row by row; without scratch
  KnownFn known_double, known_float;
};

extern const Isa isa_baseline;
#if defined(ARL_FAST_X86_ISAS)
extern const Isa isa_avx2;
extern const Isa isa_avx512;
#endif

}  // namespace arl::cpu
