// What the extension was compiled with, for Python to compare with its own sources.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "contract.h"
#include "eager/steps.h"

namespace arl {

inline constexpr const char* kForward[] = {"logits", "targets", "schedule", "options", "grad"};
inline constexpr const char* kScale[] = {"grads", "upstream", "factor", "dtype", "keep"};
inline constexpr const char* kModulateBackward[] = {"grads", "link"};

template <size_t n>
pybind11::tuple tuple_of(const char* const (&names)[n]) {
  pybind11::tuple tuple(n);
  for (size_t i = 0; i < n; ++i) tuple[i] = names[i];
  return tuple;
}

// The same names and values as _expected() in arl_fast/implementations/native.py.
inline pybind11::dict spec() {
  pybind11::dict spec;
  spec["RULES"] = tuple_of(kRules);
  spec["DEPENDENCES"] = tuple_of(kDependences);
  spec["GAINS"] = tuple_of(kGains);
  spec["REDUCTIONS"] = tuple_of(kReductions);
  spec["FUSIONS"] = tuple_of(kFusions);
  spec["BIAS_MODES"] = tuple_of(kBiasModes);
  spec["TASKS"] = tuple_of(kTasks);
  spec["SUMS"] = tuple_of(kSumNames);
  pybind11::list packed, per_branch;
  for (const PackedField& field : kPacked) {
    packed.append(field.name);
    if (field.per_branch == 1) per_branch.append(field.name);
  }
  spec["PACKED"] = pybind11::tuple(packed);
  spec["PER_BRANCH"] = pybind11::tuple(per_branch);
  pybind11::dict constants;
  constants["FLOOR"] = kFloor;
  constants["TINY_SHARE"] = kTinyShare;
  constants["HUGE_RATIO"] = kHugeRatio;
  spec["CONSTANTS"] = constants;
  pybind11::list options;
  for (const OptionField& field : kOptionFields) options.append(field.name);
  spec["Options"] = pybind11::tuple(options);
  spec["Targets"] = tuple_of(kTargetsFields);
  spec["Schedule"] = tuple_of(kScheduleFields);
  spec["BranchLogits"] = tuple_of(kBranchLogitsFields);
  spec["LinearHead"] = tuple_of(kLinearHeadFields);
  spec["forward"] = tuple_of(kForward);
  spec["scale"] = tuple_of(kScale);
  spec["modulate_backward"] = tuple_of(kModulateBackward);
  spec["fast_loss"] = tuple_of(kFastLoss);
  spec["fast_criterion"] = tuple_of(kFastCriterion);
  spec["fast_linear_loss"] = tuple_of(kFastLinearLoss);
  spec["fast_modulate"] = tuple_of(kFastModulate);
  spec["fast_unpack"] = tuple_of(kFastUnpack);
  return spec;
}

}  // namespace arl
