// Task "multilabel": every logit is a yes or no of its own, and each pair of a row and a label counts by
// itself, by the formulas of arl_fast/implementations/multilabel.py.
//
// A block walks over the pairs of one branch (of all, for a loss per pair), a thread over 16 bytes of logits at
// a time. The blocks of all branches run at once and meet the same labels at about the same time, so these
// come from DRAM once and then from L2. Sums, ticket and finish are those of forward.cuh.
#pragma once

#include "forward.cuh"

namespace arl {
namespace cuda {

// log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3, to rounding. 1 + e would lose a small e.
template <typename C>
__device__ inline C log_one_plus(C s) {
  constexpr int terms = sizeof(C) == sizeof(float) ? 7 : 16;
  const C square = s * s;
  C series = C(2) / C(2 * terms - 1);
#pragma unroll
  for (int k = terms - 2; k >= 0; --k) series = multiply_add(series, square, C(2) / C(2 * k + 1));
  return s * series;
}

template <typename C>
struct PairTerms {
  C loss, slope, entropy, dependence;  // slope: the derivative of the loss
  bool correct;
};

// Of a pair whose label is t. `weight` is 1 and `yes_weight` t without weights.
template <typename C, bool kWeighted>
__device__ inline PairTerms<C> pair_terms(C x, C t, C weight, C yes_weight, bool l1) {
  const C size = absolute(x), e = exponential(-size);
  const C both = reciprocal((C(1) + e) * (C(2) + e));
  const C larger = both * (C(2) + e), smaller = e * larger;  // of p and 1 - p
  const C log1p = log_one_plus(both * (C(1) + e) * e);
  const bool positive = x > C(0);
  const C p = positive ? larger : smaller, not_p = positive ? smaller : larger;
  const C no = C(1) - t, yes = kWeighted ? t * yes_weight : t;
  PairTerms<C> terms;
  terms.loss = multiply_add(size, positive ? no : yes, kWeighted ? (yes + no) * log1p : log1p);
  terms.slope = no * p - yes * not_p;
  if (kWeighted) {
    terms.loss *= weight;
    terms.slope *= weight;
  }
  terms.entropy = multiply_add(-maximum(-size, Constants<C>::lowest), smaller, log1p);  // inf * 0 is 0 here
  terms.dependence = l1 ? size : t * p + no * not_p;
  terms.correct = positive == (t > C(0.5));
  return terms;
}

// The row and the label of a pair.
struct Place {
  int64_t row, column;
  __device__ void next(int64_t classes) {
    if (++column == classes) {
      column = 0;
      ++row;
    }
  }
};

__device__ inline Place place_of(int64_t pair, int64_t classes) {
  if (pair < int64_t(1) << 32) {  // with a division of 32 bits
    const unsigned row = unsigned(pair) / unsigned(classes);
    return {row, int64_t(unsigned(pair) - row * unsigned(classes))};
  }
  return {pair / classes, pair % classes};
}

__device__ inline bool is_present(const ForwardArgs& a, int branch, int64_t row) {
  return branch == 0 || a.mask == nullptr ||
         a.mask[row * a.mask_row_stride + (branch - 1) * a.mask_column_stride];
}

// ---- counting --------------------------------------------------------------------------------------------

// Pairs of a branch that count, of those that one of `threads` threads takes.
template <typename C>
__device__ inline C count_pairs(const ForwardArgs& a, int branch, int64_t thread, int64_t threads) {
  const C* target = static_cast<const C*>(a.target);
  const int64_t pairs = a.rows * a.classes;
  C count = C(0);
  int64_t done = 0;
  if ((branch == 0 || a.mask == nullptr) && a.target_stride == a.classes && is_aligned(target)) {
    constexpr int kN = kPerVector<C>;
    done = pairs / kN * kN;
#pragma unroll 4
    for (int64_t i = thread * kN; i < done; i += threads * kN) {
      C t[kN];
      decode(__ldg(reinterpret_cast<const uint4*>(target + i)), t, C());
#pragma unroll
      for (int k = 0; k < kN; ++k) count += t[k] == t[k] ? C(1) : C(0);
    }
  }
  for (int64_t i = done + thread; i < pairs; i += threads) {
    const Place place = place_of(i, a.classes);
    const C t = target[place.row * a.target_stride + place.column];
    count += t == t && is_present(a, branch, place.row) ? C(1) : C(0);
  }
  return count;
}

// The separate counting launch, partial counts [gridDim.y, gridDim.x]: one row for all branches without a mask.
template <typename C>
__global__ void __launch_bounds__(kRowsThreads)
    count_pairs_kernel(const __grid_constant__ ForwardParams<C> p) {
  __shared__ C buffer[32];
  C count[1] = {count_pairs<C>(p.args, blockIdx.y, int64_t(blockIdx.x) * blockDim.x + threadIdx.x,
                               int64_t(gridDim.x) * blockDim.x)};
  reduce_block(count, buffer, C(0), Add());
  if (threadIdx.x == 0) p.divisors[blockIdx.y * gridDim.x + blockIdx.x] = count[0];
}

// What the gradients of a branch are divided by. All threads of the block call it and get the same value in
// every block.
template <typename C>
__device__ inline C pair_divisor(const ForwardParams<C>& p, int branch, C* buffer) {
  const ForwardArgs& a = p.args;
  if (!p.grad || a.options.reduction != kMean) return C(1);
  if (a.divisor != nullptr) return static_cast<const C*>(a.divisor)[branch];
  if (p.count_blocks > 0) {
    return sum_of_counts(p.divisors + (a.mask == nullptr ? 0 : branch) * p.count_blocks, p.count_blocks);
  }
  C count[1] = {count_pairs<C>(a, branch, threadIdx.x, blockDim.x)};
  reduce_block(count, buffer, C(0), Add());
  return count[0];
}

// ---- the kernel ------------------------------------------------------------------------------------------

// n results to adjacent addresses, of which `count` exist.
template <typename G, typename C, int n>
__device__ inline void store_some(G* out, const C (&v)[n], int count) {
  if (count == n && is_aligned(out)) {
    store(out, v, true);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < count) out[i] = Narrow<G>::from(v[i]);
    }
  }
}

// n values of rows with gaps or without, from a place on, of which `count` exist; `other` for the rest.
template <typename T, typename C, int n>
__device__ inline void load_some(const T* values, int64_t stride, int64_t classes, int64_t first, Place place,
                                 int count, C other, C (&v)[n]) {
  constexpr int kN = kPerVector<T>;
  const T* from = values + first;
  if (count == n && stride == classes && is_aligned(from)) {
#pragma unroll
    for (int i = 0; i < n; i += kN) {
      C part[kN];
      decode(__ldg(reinterpret_cast<const uint4*>(from + i)), part, T());
#pragma unroll
      for (int k = 0; k < kN; ++k) v[i + k] = part[k];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    v[i] = i < count ? C(widen(values[place.row * stride + place.column])) : other;
    place.next(classes);
  }
}

// kWeighted: labels have weights. kEach: the loss of each pair is wanted.
template <typename T, bool kWeighted, bool kEach, typename C = typename Element<T>::Compute>
__global__ void __launch_bounds__(kRowsThreads, resident_pairs(sizeof(T), kWeighted, kEach) / kRowsThreads)
    labels_kernel(const __grid_constant__ ForwardParams<C> p) {
  using G = typename Element<T>::Grad;
  constexpr int kN = kPerVector<T>;
  __shared__ C block_sums[kSums * 32];
  const ForwardArgs& a = p.args;
  const int64_t pairs = a.rows * a.classes;
  const C *weight = static_cast<const C*>(a.weight), *pos_weight = static_cast<const C*>(a.pos_weight);
  const bool l1 = a.options.dependence == kLogitL1;

  for (int branch = blockIdx.y; branch < a.branches; branch += gridDim.y) {
    const C gamma = branch == 0 ? C(1) : gamma_of<C>(a.schedule, branch - 1);
    const C divisor = pair_divisor(p, branch, block_sums);
    const C scale = divisor == C(0) ? C(0) : gamma / divisor;  // nothing counts: gradients are 0, not 0 / 0
    const bool masked = branch > 0 && a.mask != nullptr;
    C sums[kSums] = {};
    for (int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kN; first < pairs;
         first += int64_t(gridDim.x) * blockDim.x * kN) {
      const int count = pairs - first < kN ? int(pairs - first) : kN;
      const bool gaps = a.row_stride[branch] != a.classes || a.target_stride != a.classes;
      Place place = {0, first};
      if (kWeighted || masked || gaps || count < kN) place = place_of(first, a.classes);
      C t[kN], x[kN], loss[kN];
      load_some(static_cast<const C*>(a.target), a.target_stride, a.classes, first, place, count, C(NAN), t);
      load_some(static_cast<const T*>(a.logits[branch]), a.row_stride[branch], a.classes, first, place, count,
                C(0), x);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const bool known = t[i] == t[i] && (!masked || is_present(a, branch, place.row));
        const C w = kWeighted && weight != nullptr ? weight[place.column] : C(1);
        const C yes = kWeighted && pos_weight != nullptr ? pos_weight[place.column] : C(1);
        // A certain and right "no" has loss, slope and entropy 0: it stands in for what does not count.
        const PairTerms<C> terms = pair_terms<C, kWeighted>(known ? x[i] : Constants<C>::lowest,
                                                            known ? t[i] : C(0), w, yes, l1);
        sums[kLoss] += terms.loss;
        sums[kCount] += known ? C(1) : C(0);
        sums[kCorrect] += known && terms.correct ? C(1) : C(0);
        sums[kEntropy] += terms.entropy;
        sums[kDependence] += known ? terms.dependence : C(0);
        x[i] = terms.slope * scale;
        loss[i] = terms.loss;
        if (kWeighted || masked) place.next(a.classes);
      }
      if (p.grad) store_some(static_cast<G*>(a.grads[branch]) + first, x, count);
      if constexpr (kEach) {  // this thread adds up the branches of its pairs, one after the other
        C* out = static_cast<C*>(a.loss) + first;
        if (branch > 0) {
#pragma unroll
          for (int i = 0; i < kN; ++i) {
            if (i < count) loss[i] = multiply_add(gamma, loss[i], out[i]);
          }
        }
        store_some(out, loss, count);
      }
    }
    sums[kDivisor] = sums[kCount];
    __syncthreads();  // block_sums held the divisor
    add_block(p, branch, sums, block_sums);
  }
  finish_if_last(p);
}

// Enqueues the launches for one dtype.
template <typename T, typename C = typename Element<T>::Compute>
int launch_labels(const ForwardArgs& args, const Plan& plan, void* stream) {
  using Kernel = void (*)(ForwardParams<C>);
  ForwardParams<C> params;
  if (const int error = prepare(args, plan, stream, params)) return error;
  if (plan.count_blocks > 0) {
    const Kernel kernel = count_pairs_kernel<C>;
    const dim3 grid(plan.count_blocks, args.mask == nullptr ? 1 : args.branches);
    if (const int error = launch(kernel, grid, kRowsThreads, 0, stream, params)) return error;
  }
  const bool weighted = args.weight != nullptr || args.pos_weight != nullptr;
  const bool each = args.options.reduction == kNoReduction;
  const Kernel kernel = weighted ? (each ? labels_kernel<T, true, true> : labels_kernel<T, true, false>)
                                 : (each ? labels_kernel<T, false, true> : labels_kernel<T, false, false>);
  return launch(kernel, dim3(plan.grid_x, plan.grid_y), plan.threads, 0, stream, params);
}

}  // namespace cuda
}  // namespace arl
