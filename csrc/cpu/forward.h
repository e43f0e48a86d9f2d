// The loss on the CPU, on tensors: everything between torch and the row kernels.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "loss.h"

namespace arl::cpu {

// Arguments as in arl_fast/reference.py, which documents them; logits are 2-D tensors on the CPU.
struct Inputs {
  at::TensorList logits;
  const at::Tensor* target = nullptr;
  const at::Tensor* mask = nullptr;
  const at::Tensor* weight = nullptr;
  const at::Tensor* norm = nullptr;
  double gamma = 1, temperature = 1;
  bool warming = false;
  uint64_t wanted = 0;    // bit b: the gradient of branch b is to be written
  bool in_place = false;  // gradients overwrite the logits, which are contiguous and not float16
};

struct Outputs {
  at::Tensor loss;    // 0-d, or [rows] for reduction "none"
  at::Tensor packed;  // [16M+9]
  c10::SmallVector<at::Tensor, 4> grads;  // [rows, classes], undefined where not wanted
};

Outputs forward(const Inputs& inputs, const Options& options);

// Names of the instruction sets that this CPU can run, best first, and the one in use.
std::vector<std::string> available_isas();
std::string isa();
void set_isa(const std::string& name);

}  // namespace arl::cpu
