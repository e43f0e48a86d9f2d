// Memory of large gradients on the CPU.
//
// A large block from malloc is mapped afresh in every step, and the page faults cost as much as the arithmetic. Here a
// freed block is kept for the next gradient of its size, up to a limit, and lies on huge pages where the system has them.
#pragma once

#include <ATen/ATen.h>

namespace arl::cpu {

// Uninitialised tensors; NaN everywhere while torch fills uninitialised memory for determinism.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);
at::Tensor empty_gradient(int64_t rows, int64_t classes, at::ScalarType dtype);

// Gives the kept blocks back to the system; called by a forward pass that writes no gradients.
void release_kept_memory();

// Bytes of the kept blocks.
int64_t kept_memory();

}  // namespace arl::cpu
