// Memory of large gradients on the CPU.
//
// A large block from malloc is mapped afresh in every step, and the page faults cost as much as the
// arithmetic. Here a freed block is kept for a later gradient of about its size, and lies on huge pages where
// the system has them. Kept are at most 2 GiB, none for more than a minute of calls that do not use it, and
// none that has become too small.
#pragma once

#include <ATen/ATen.h>

namespace arl::cpu {

// Uninitialised tensors; NaN everywhere while torch fills uninitialised memory for determinism.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);
at::Tensor empty_gradient(int64_t rows, int64_t classes, at::ScalarType dtype);

// Gives kept blocks back to the system: all of them, returning their bytes, or those that nobody has used for
// a minute.
int64_t release_memory();
void release_unused_memory();

// Bytes of the kept blocks.
int64_t kept_memory();

}  // namespace arl::cpu
