// The arguments of the contract (docs/architecture.md) as C++ sees them: borrowed tensors and plain numbers.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <tuple>
#include <vector>

#include "finish.h"

namespace arl {

// Targets of arl_fast/_core/branches.py; null where Python has None.
inline constexpr const char* kTargetsFields[] = {"target", "mask", "weight", "divisor", "pos_weight"};
struct Targets {
  const at::Tensor* target = nullptr;
  const at::Tensor* mask = nullptr;
  const at::Tensor* weight = nullptr;
  const at::Tensor* divisor = nullptr;
  const at::Tensor* pos_weight = nullptr;
};

// Schedule of arl_fast/_core/options.py: a tensor where it is one, else the numbers.
inline constexpr const char* kScheduleFields[] = {"gamma", "temperature", "warmup", "step"};
struct Schedule {
  const at::Tensor* gamma = nullptr;        // [] or [M]
  const at::Tensor* temperature = nullptr;  // []
  const at::Tensor* step = nullptr;         // [], an integer; null: 0
  c10::SmallVector<double, 4> gammas;       // without a tensor: one, or one per modality
  double temperature_number = 1;            // without a tensor
  int64_t warmup = 0;
};

// Loss, packed statistics and gradients, these empty if not asked for.
using Results = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;

}  // namespace arl
