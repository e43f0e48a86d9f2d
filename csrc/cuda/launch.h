// The CUDA launchers, for callers that know nothing of CUDA: raw device pointers, no torch and no CUDA
// headers.
//
// Every launcher enqueues on `stream` of the current device and returns at once: no synchronisation, no
// allocation, so everything can be captured in a CUDA graph. The result is 0 or the cudaError_t (see
// error_string).
#pragma once

#include <cstdint>

#include "../finish.h"
#include "plan.h"

namespace arl {
namespace cuda {

// More branches than this (15 modalities) are refused with cudaErrorInvalidValue: the caller takes the
// reference.
constexpr int kMaxBranches = 16;

// Class indices come as int64 or int32, class probabilities, and labels in [0, 1] or NaN, in the compute dtype
// (float64 for float64 logits, else float32).
enum Target : int { kInt64 = 0, kInt32 = 1, kProbabilities = 2 };

// The numbers of a step. What is a tensor of the device stays there: its pointer replaces the number.
struct ScheduleArgs {
  const void* gamma;        // compute dtype, or null: gammas
  int64_t gamma_stride;     // elements from one modality's to the next; 0: one for all
  const void* temperature;  // compute dtype, or null: temperature_number
  const int64_t* step;      // null: 0. The step belongs to the warm-up if it is below `warmup`
  double gammas[kMaxBranches - 1];
  double temperature_number;
  int64_t warmup;
};

struct ForwardArgs {
  int dtype;     // Dtype of the logits
  int branches;  // M + 1, the fused branch first
  int64_t rows;
  int64_t classes;
  const void* logits[kMaxBranches];  // rows of `classes` adjacent elements, element-aligned, ...
  int64_t row_stride[kMaxBranches];  // ... this many elements apart (0 for expanded rows)
  void* grads[kMaxBranches];  // contiguous [rows, classes], dtype grad_dtype(dtype); all null: no gradients

  const void* target;
  int target_kind;        // Target
  int64_t target_stride;  // elements from row to row; probabilities of one row are adjacent
  const bool* mask;       // [rows, M] or null
  int64_t mask_row_stride;
  int64_t mask_column_stride;
  const void* weight;      // [classes] in the compute dtype, adjacent, or null
  const void* pos_weight;  // the same, for task "multilabel"
  const void*
      divisor;  // [M + 1] in the compute dtype: of the gradients for reduction "mean"; null: it is counted

  ScheduleArgs schedule;
  Options options;

  void* loss;    // compute dtype: one element; for reduction "none" [rows], of labels [rows, classes]
  void* packed;  // compute dtype, [packed_length(M)]

  // Scratch of forward_workspace_bytes(), 16-byte aligned, not initialised; free to reuse after the call in
  // stream order.
  void* workspace;
};

// Scratch that forward() needs for these arguments on the current device (workspace itself may still be
// null).
int forward_workspace_bytes(const ForwardArgs& args, int64_t* bytes);

// Loss, packed statistics and, where asked for, gradients of all branches: one launch, plus a small one that
// counts the rows when plan() says that this is cheaper.
int forward(const ForwardArgs& args, void* stream);

struct ScaleArgs {
  int dtype;  // Dtype of the result, the logits'; gradients come in as grad_dtype(dtype)
  int branches;
  int64_t rows;
  int64_t classes;
  const void* grads[kMaxBranches];  // contiguous [rows, classes]
  void*
      out[kMaxBranches];  // contiguous; equal to grads for in place, which leaves early where the factor is 1
  const void* upstream;   // compute dtype: one element, or [rows] if per_row
  bool per_row;
  int64_t upstream_stride;  // elements, with per_row
  const void* factor;       // [branches] in the compute dtype, or null
};

// grads * upstream * factor for all branches in one launch.
int scale(const ScaleArgs& args, void* stream);

constexpr int kMaxTensors = 16;  // more are refused: the caller calls again

struct ModulateArgs {
  int count;
  int dtype[kMaxTensors];  // Dtype of each gradient and its result
  const void* grads[kMaxTensors];
  void* out[kMaxTensors];  // equal to grads for in place
  int64_t size[kMaxTensors];
  int link_index[kMaxTensors];  // which entry of link scales this tensor (gradients that are None are left
                                // out by the caller)
  const void* link;             // gain - 1
  int link_dtype;               // kFloat64 or kFloat32
};

// grads * (1 + link) for all modalities in one launch (Eq. 19).
int modulate_backward(const ModulateArgs& args, void* stream);

const char* error_string(int error);

// The counter by which a launch's last block knows that it is the last: 0 before the launch and 0 after it.
// Each stream has one of its own, and so has each launch in a captured graph, which any stream may replay.
// Null if none is left: then a memset zeroes one in the workspace.
int take_ticket(void* stream, unsigned** ticket);

// Whether a graph is being captured from a stream; where that cannot be told, too.
bool is_capturing(void* stream);

}  // namespace cuda
}  // namespace arl
