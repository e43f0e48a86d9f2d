// Work on torch's threads.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>

#include <numeric>

namespace arl::cpu {

// run(begin, end) over parts of [0, items) that together are all of it, of about `grain` items or more; one
// call on this thread if there are fewer than two such parts.
//
// Not at::parallel_for: it is a template, and compiled here it runs on one thread without -fopenmp, with it
// on an OpenMP runtime other than that of torch's wheels, which does not know of torch.set_num_threads. A
// loop of TensorIterator is torch's own.
template <class Run>
void parallel(int64_t items, int64_t grain, const Run& run) {
  if (items < 2 * grain || at::get_num_threads() == 1) return run(0, items);
  at::Tensor numbers = at::detail::empty_cpu({items}, at::kLong);
  int64_t* first = numbers.mutable_data_ptr<int64_t>();
  std::iota(first, first + items, int64_t(0));
  at::TensorIterator::nullary_op(numbers).for_each(
      [&run](char** data, const int64_t*, int64_t count) {
        const int64_t begin = *reinterpret_cast<const int64_t*>(data[0]);
        run(begin, begin + count);
      },
      grain);
}

}  // namespace arl::cpu
