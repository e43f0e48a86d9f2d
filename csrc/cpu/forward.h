// The loss on the CPU, on tensors: everything between torch and the row kernels.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "../contract.h"
#include "loss.h"

namespace arl::cpu {

// The schedule of one step in numbers.
struct Numbers {
  c10::SmallVector<double, 4> gammas;  // one, or one per modality
  double temperature = 1;
  bool warming = false;

  double gamma(int modality) const { return warming ? 1 : gammas[gammas.size() == 1 ? 0 : modality]; }
};

// Reads the tensors of a schedule, which are on the CPU.
Numbers read(const Schedule& schedule);

// Arguments as in arl_fast/implementations/reference.py, which documents them. Logits are tensors on the CPU,
// borrowed, since a reference to a tensor of Python's costs more than reading it.
struct Inputs {
  c10::SmallVector<const at::Tensor*, 4> logits;
  Targets targets;
  Numbers numbers;
  uint64_t wanted = 0;    // bit b: the gradient of branch b is to be written
  bool in_place = false;  // gradients overwrite the logits, which are contiguous and not float16
  bool shared = false;    // small results may share an allocation
};

struct Outputs {
  at::Tensor loss;                        // 0-d; for reduction "none" [rows], of labels [rows, classes]
  at::Tensor packed;                      // [packed_length(M)]
  c10::SmallVector<at::Tensor, 4> grads;  // [rows, classes], undefined where not wanted
};

Outputs forward(const Inputs& inputs, const Options& options);

// Names of the instruction sets that this CPU can run, best first, and the one in use.
std::vector<std::string> available_isas();
std::string isa();
void set_isa(const std::string& name);

}  // namespace arl::cpu
