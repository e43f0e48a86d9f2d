// Loss, statistics, coefficients and gradients of all branches in one launch.
//
// A block, or a cluster of blocks, walks over rows of one branch (of all, for a per-row loss). It reads a row
// once, keeps it on chip, reduces it (top; then Z = sum e^v and sum v e^v with v = x - top; entropy,
// cross-entropy and p_y follow), writes the row's gradient and adds the row to six sums. The block that
// finishes last adds up the sums of all blocks, in the same order whoever is last, and turns them into the
// loss and the packed statistics with arl::finish.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace arl {
namespace cuda {

// C is the compute type throughout: double for double logits, else float.
template <typename C>
struct ForwardParams {
  ForwardArgs args;
  unsigned* ticket;
  C* partials;  // [6, branches, grid_x]
  C* divisors;  // [branches, count_blocks]
  C smoothing;
  C uniform;  // smoothing / classes
  int count_blocks;
  int threads_per_row;
  int shared_vectors;
  int cluster;  // blocks that share a row
  int teams;    // grid_x / cluster
  bool grad;
};

// ---- targets ---------------------------------------------------------------------------------------------

struct RowTarget {
  int index;   // class index; 0 for probabilities and where it is out of range
  bool valid;  // not ignored, modality present
  bool bad;    // out of range: everything about this row is NaN
};

__device__ inline RowTarget read_target(const ForwardArgs& a, int branch, int64_t row) {
  RowTarget target = {0, true, false};
  if (a.target_kind != kProbabilities) {
    const int64_t at = row * a.target_stride;
    const int64_t index = a.target_kind == kInt64 ? static_cast<const int64_t*>(a.target)[at]
                                                  : static_cast<const int*>(a.target)[at];
    target.valid = index != a.options.ignore_index;
    target.bad = target.valid && (index < 0 || index >= a.classes);
    target.index = target.valid && !target.bad ? int(index) : 0;
  }
  if (branch > 0 && a.mask != nullptr &&
      !a.mask[row * a.mask_row_stride + (branch - 1) * a.mask_column_stride]) {
    target.valid = target.bad = false;
  }
  return target;
}

// What a row adds to its branch's divisor: 1, or with class indices its class weight.
template <typename C>
__device__ inline C row_divisor(const ForwardArgs& a, const RowTarget& target) {
  if (!target.valid || target.bad) return C(0);
  return a.weight != nullptr && a.target_kind != kProbabilities
             ? static_cast<const C*>(a.weight)[target.index]
             : C(1);
}

template <typename C>
__device__ inline C count_rows(const ForwardArgs& a, int branch, int64_t first, int64_t step) {
  C divisor = C(0);
  for (int64_t row = first; row < a.rows; row += step)
    divisor += row_divisor<C>(a, read_target(a, branch, row));
  return divisor;
}

// The sum of what a launch before has counted, for every thread of a warp.
template <typename C>
__device__ inline C sum_of_counts(const C* counts, int blocks) {
  C sum[1] = {C(0)};
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < blocks; i += 32) sum[0] += counts[i];
  reduce_warp(sum, Add());
  return sum[0];
}

// The divisor of a branch's gradients. All threads of the block call it and get the same value in every
// block.
template <typename C>
__device__ inline C gradient_divisor(const ForwardParams<C>& p, int branch, C* buffer) {
  const ForwardArgs& a = p.args;
  if (!p.grad || a.options.reduction != kMean) return C(1);
  if (a.divisor != nullptr) return static_cast<const C*>(a.divisor)[branch];
  if (a.target_kind == kProbabilities && a.mask == nullptr) return C(a.rows);
  C divisor[1] = {C(0)};
  if (p.count_blocks > 0) {
    divisor[0] = sum_of_counts(p.divisors + branch * p.count_blocks, p.count_blocks);
  } else {
    divisor[0] = count_rows<C>(a, branch, threadIdx.x, blockDim.x);
    __syncthreads();  // the buffer may still be in use for the branch before
    reduce_block(divisor, buffer, C(0), Add());
  }
  return divisor[0];
}

// The separate counting launch: partial divisors [branches, count_blocks].
template <typename C>
__global__ void __launch_bounds__(kRowsThreads) count_kernel(const __grid_constant__ ForwardParams<C> p) {
  __shared__ C buffer[32];
  C divisor[1] = {count_rows<C>(p.args, blockIdx.y, int64_t(blockIdx.x) * blockDim.x + threadIdx.x,
                                int64_t(gridDim.x) * blockDim.x)};
  reduce_block(divisor, buffer, C(0), Add());
  if (threadIdx.x == 0) p.divisors[blockIdx.y * gridDim.x + blockIdx.x] = divisor[0];
}

// ---- rows on chip ----------------------------------------------------------------------------------------
// Both kinds offer: load, and finish_load before the first use; visit(f), f(x, class) for every element,
// padding of -inf included, where `keep` stores what f made of x; visit_real(f), the same without padding;
// emit(f), which stores f(e^v, class) as the gradient.

// kSmall: up to kHeld scalars per thread, adjacent threads hold adjacent classes.
template <typename T>
struct ScalarRow {
  using C = typename Element<T>::Compute;
  using G = typename Element<T>::Grad;
  C held[kHeld];
  int classes, lane, lanes;

  __device__ ScalarRow(const ForwardParams<C>& p)
      : classes(int(p.args.classes)), lane(threadIdx.x % p.threads_per_row), lanes(p.threads_per_row) {}

  __device__ int place() const { return lane; }

  __device__ void load(const T* row, bool valid) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int c = lane + k * lanes;
      held[k] = valid && c < classes ? widen(row[c]) : C(-INFINITY);
    }
  }
  __device__ void finish_load() const {}

  template <bool keep, typename F>
  __device__ void visit(F f) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      C x = held[k];
      f(x, lane + k * lanes);
      if (keep) held[k] = x;
    }
  }
  template <bool keep, typename F>
  __device__ void visit_real(F f) {
    visit<keep>([&](C& x, int c) {
      if (c < classes) f(x, c);
    });
  }
  template <typename F>
  __device__ void emit(G* grad, C, F f) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int c = lane + k * lanes;
      if (c < classes) grad[c] = Narrow<G>::from(f(held[k], c));
    }
  }
};

// kWarp and kBlock: the row's 16-byte vectors, dealt out in turn. The few elements before the first and after
// the last aligned vector go one to a thread. Vectors beyond the registers and the shared memory are read
// again for every pass, out of L2 mostly: rows that long are few at a time.
template <typename T, int kFamily>
struct VectorRow {
  using C = typename Element<T>::Compute;
  using G = typename Element<T>::Grad;
  static constexpr int kN = kPerVector<T>;
  // A row of at least a float per element is held as numbers, and e^v then takes the place of x. So are the
  // short rows of 16-bit types; their long rows stay packed, and e^v is computed again.
  static constexpr bool kPacked = sizeof(T) < sizeof(float) && kFamily == kBlock;
  static constexpr int kVectors = held_vectors(sizeof(T), kFamily);

  std::conditional_t<kPacked, uint4, C[kN]> held[kVectors];
  C edge;
  int classes, thread, threads, shared_vectors;
  int head;  // elements before the first vector
  int vectors;
  const uint4* body;

  __device__ VectorRow(const ForwardParams<C>& p)
      : classes(int(p.args.classes)),
        thread(kFamily == kWarp ? threadIdx.x % 32 : cluster_rank() * blockDim.x + threadIdx.x),
        threads(kFamily == kWarp ? 32 : blockDim.x * p.cluster),
        shared_vectors(p.shared_vectors) {}

  __device__ int place() const { return thread; }

  // The class of this thread's `edge`, if it is one: first the elements before the vectors, then those after.
  __device__ int edge_class() const { return thread < head ? thread : vectors * kN + thread; }

  __device__ uint4* slot(int k) const { return dynamic_shared() + (k * blockDim.x + threadIdx.x); }

  __device__ void load(const T* row, bool) {
    const int misaligned = int(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kN);
    head = misaligned == 0 ? 0 : kN - misaligned;  // rows here are longer than a vector
    vectors = (classes - head) / kN;
    body = reinterpret_cast<const uint4*>(row + head);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int j = thread + k * threads;
      const uint4 raw = j < vectors ? __ldg(body + j) : padding_vector<T>();
      if constexpr (kPacked) {
        held[k] = raw;
      } else {
        decode(raw, held[k], T());
      }
    }
    if constexpr (kFamily == kBlock) {
#pragma unroll 4
      for (int k = 0; k < shared_vectors; ++k) {
        const int j = thread + (kVectors + k) * threads;
        if (j < vectors) {
          copy_async(slot(k), body + j);
        } else {
          *slot(k) = padding_vector<T>();
        }
      }
    }
    edge = edge_class() < classes ? widen(row[edge_class()]) : C(-INFINITY);
  }

  __device__ void finish_load() const {
    if constexpr (kFamily == kBlock) wait_for_copies();
  }

  // Begins to bring the beginning of a later row into L2.
  __device__ void prefetch(const T* row) const {
    constexpr int kLine = 128;
    const char* bytes = reinterpret_cast<const char*>(row);
    const int64_t size = classes * int64_t(sizeof(T));
    const int end = size < kPrefetchBytes ? int(size) : kPrefetchBytes;
    for (int at = thread * kLine; at < end; at += threads * kLine) prefetch_line(bytes + at);
  }

  __device__ void unpack(int k, C (&v)[kN]) {
    if constexpr (kPacked) {
      forget(held[k]);
      decode(held[k], v, T());
    } else {
#pragma unroll
      for (int i = 0; i < kN; ++i) v[i] = held[k][i];
    }
  }
  template <typename F>
  __device__ void visit_vector(C (&v)[kN], int j, F& f) {
#pragma unroll
    for (int i = 0; i < kN; ++i) f(v[i], head + j * kN + i);
  }
  template <bool keep, bool real, typename F>
  __device__ void visit_all(F& f) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int j = thread + k * threads;
      if (real && j >= vectors) continue;
      C v[kN];
      unpack(k, v);
      visit_vector(v, j, f);
      if constexpr (real) finish_loads();
      if constexpr (keep && !kPacked) {
#pragma unroll
        for (int i = 0; i < kN; ++i) held[k][i] = v[i];
      }
    }
    if constexpr (kFamily == kBlock) {
      for (int k = 0; k < shared_vectors; ++k) {
        const int j = thread + (kVectors + k) * threads;
        if (real && j >= vectors) break;
        C v[kN];
        decode(*slot(k), v, T());
        visit_vector(v, j, f);
      }
      for (int j = thread + (kVectors + shared_vectors) * threads; j < vectors; j += threads) {
        C v[kN];
        decode(__ldg(body + j), v, T());
        visit_vector(v, j, f);
      }
    }
    if (edge_class() < classes) {
      C x = edge;
      f(x, edge_class());
    }
  }
  template <bool keep, typename F>
  __device__ void visit(F f) {
    visit_all<keep, false>(f);
  }
  template <bool keep, typename F>
  __device__ void visit_real(F f) {
    visit_all<keep, true>(f);
  }

  template <bool kept, bool aligned, typename F>
  __device__ void emit_vector(C (&v)[kN], int j, G* grad, C top, F& f) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const C power = kept ? v[i] : exponential(v[i] - top);
      v[i] = f(power, head + j * kN + i);
    }
    store(grad + head + j * kN, v, aligned);
  }
  template <bool aligned, typename F>
  __device__ void emit_vectors(G* grad, C top, F& f) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int j = thread + k * threads;
      C v[kN];
      unpack(k, v);
      if (j < vectors) emit_vector<!kPacked, aligned>(v, j, grad, top, f);
    }
    if constexpr (kFamily == kBlock) {
      for (int k = 0; k < shared_vectors; ++k) {
        const int j = thread + (kVectors + k) * threads;
        C v[kN];
        decode(*slot(k), v, T());
        if (j < vectors) emit_vector<false, aligned>(v, j, grad, top, f);
      }
      for (int j = thread + (kVectors + shared_vectors) * threads; j < vectors; j += threads) {
        C v[kN];
        decode(__ldg(body + j), v, T());
        emit_vector<false, aligned>(v, j, grad, top, f);
      }
    }
  }
  // Two loops, rather than a choice per vector, are what registers suffice for.
  template <typename F>
  __device__ void emit(G* grad, C top, F f) {
    if (is_aligned(grad + head)) {
      emit_vectors<true>(grad, top, f);
    } else {
      emit_vectors<false>(grad, top, f);
    }
    if (edge_class() < classes) {
      grad[edge_class()] = Narrow<G>::from(f(exponential(edge - top), edge_class()));
    }
  }

  // The thread that stores a class in emit().
  __device__ bool owns(int c) const {
    const int inside = c - head;
    return inside >= 0 && inside < vectors * kN ? inside / kN % threads == thread : c == edge_class();
  }
};

// ---- one row ---------------------------------------------------------------------------------------------

// Buffers of the block-wide reductions of a row. Two in turn, so that each reduction needs one barrier only.
// A block's part of each is followed by the cluster's.
template <typename C>
struct RowBuffers {
  C top[2 * (32 + kMostCluster)];
  C sums[8 * (32 + kMostCluster)];
  int first[2 * (32 + kMostCluster)];
};

template <int kFamily, int n, typename V, typename Params, typename Op>
__device__ inline void reduce_row(V (&v)[n], const Params& p, V* buffer, V identity, Op op) {
  if constexpr (kFamily == kSmall) {
    reduce_lanes(v, p.threads_per_row, op);
  } else if constexpr (kFamily == kWarp) {
    reduce_warp(v, op);
  } else {
    reduce_block(v, buffer, identity, op);
    if (p.cluster > 1) reduce_cluster(v, p.cluster, buffer + n * 32, op);
  }
}

// A block's sums over the rows of a branch. All threads of a row know its addends: where a row has at least a
// warp, thread i keeps sum i, one register in the place of six; else the row's first thread keeps all.
template <typename C, int kFamily>
struct BranchSums {
  C own = C(0);
  __device__ void add(const C (&row)[kSums], int place) {
    C addend = C(0);
#pragma unroll
    for (int i = 0; i < kSums; ++i) addend = place == i ? row[i] : addend;
    own += addend;
  }
  __device__ void spread(C (&v)[kSums]) const {
    const int place = kFamily == kWarp ? threadIdx.x % 32 : threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; ++i) v[i] = place == i ? own : C(0);
  }
};
template <typename C>
struct BranchSums<C, kSmall> {
  C sums[kSums] = {};
  __device__ void add(const C (&row)[kSums], int place) {
    if (place != 0) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += row[i];
  }
  __device__ void spread(C (&v)[kSums]) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) v[i] = sums[i];
  }
};

// kDense: the target's distribution differs from class to class (probabilities, or label smoothing under
// class weights). `scale` multiplies the gradient. Returns the row's loss.
template <typename T, int kFamily>
using RowOf = std::conditional_t<kFamily == kSmall, ScalarRow<T>, VectorRow<T, kFamily>>;

template <typename T, typename C = typename Element<T>::Compute>
__device__ inline const T* row_of(const ForwardArgs& a, int branch, int64_t row) {
  return static_cast<const T*>(a.logits[branch]) + row * a.row_stride[branch];
}

// Begins to load a row; process_row follows.
template <typename T, int kFamily>
__device__ inline RowTarget load_row(const ForwardArgs& a, int branch, int64_t row, bool inside,
                                     RowOf<T, kFamily>& held) {
  RowTarget target = {0, false, false};
  if (inside) target = read_target(a, branch, row);
  if (kFamily == kSmall || target.valid) held.load(row_of<T>(a, branch, row), target.valid);
  return target;
}

template <typename T, int kFamily, bool kDense, typename C = typename Element<T>::Compute>
__device__ inline C process_row(const ForwardParams<C>& p, int branch, int64_t row, bool inside,
                                const RowTarget& target, RowOf<T, kFamily>& held, C scale,
                                RowBuffers<C>& buffers, BranchSums<C, kFamily>& sums) {
  using G = typename Element<T>::Grad;
  const ForwardArgs& a = p.args;
  const bool writes = p.grad && inside;
  const auto grad_row = [&] {  // late: registers are short
    return static_cast<G*>(a.grads[branch]) + row * a.classes;
  };

  if constexpr (kFamily != kSmall) {  // all threads of the row, whole warps, agree
    if (!target.valid) {
      if (writes) {
        G* grad = grad_row();
        for (int c = held.thread; c < held.classes; c += held.threads) grad[c] = Narrow<G>::from(C(0));
      }
      return C(0);
    }
  }
  held.finish_load();

  // The target's distribution: w_c ((1 - smoothing) t_c + smoothing / classes), with w_y on the whole of t_y
  // for indices.
  const bool soft = kDense && a.target_kind == kProbabilities;
  const C smoothing = p.smoothing, uniform = p.uniform;
  const C* weight = static_cast<const C*>(a.weight);
  const C* probabilities = static_cast<const C*>(a.target) + (soft ? row * a.target_stride : 0);
  const auto spread = [&](int c) {  // the part of it that is spread over the classes
    const C share = soft ? multiply_add(C(1) - smoothing, probabilities[c], uniform) : uniform;
    return weight != nullptr ? share * weight[c] : share;
  };
  const C divisor = row_divisor<C>(a, target);
  const C target_share =
      soft ? C(0) : (C(1) - smoothing) * divisor;  // the part of it that class y has on top
  const C target_logit = !soft && target.valid ? widen(row_of<T>(a, branch, row)[target.index]) : C(0);

  C top[2] = {C(-INFINITY), C(-INFINITY)};
  held.template visit<false>([&](C& v, int) { top[0] = maximum(top[0], v); });
  if (soft) {
    if (target.valid)
      held.template visit_real<false>([&](C&, int c) { top[1] = maximum(top[1], probabilities[c]); });
    reduce_row<kFamily>(top, p, buffers.top, C(-INFINITY), Maximum());
  } else {
    C only[1] = {top[0]};
    reduce_row<kFamily>(only, p, buffers.top, C(-INFINITY), Maximum());
    top[0] = only[0];
  }

  enum { kZ, kEnergy, kEarlier, kBelow, kAbsolute, kCross, kMass, kExpected, kRowSums };
  C s[kRowSums] = {};
  int first[2] = {held.classes,
                  held.classes};  // probabilities: the first largest logit and the first largest target
  const bool l1 = a.options.dependence == kLogitL1;
  const bool extra = l1 || smoothing > C(0);
  if (!soft && target_logit == top[0]) {  // is an earlier class as large?
    held.template visit<false>(
        [&](C& v, int c) { s[kEarlier] += v == top[0] && c < target.index ? C(1) : C(0); });
  }
  if (extra && target.valid) {
    held.template visit_real<false>([&](C& v, int) {
      s[kBelow] += v - top[0];
      s[kAbsolute] += absolute(v);
    });
  }
  if constexpr (kDense) {
    if (target.valid) {
      held.template visit_real<false>([&](C& v, int c) {
        const C share = spread(c);
        s[kCross] = multiply_add(share, v - top[0], s[kCross]);
        s[kMass] += share;
        if (soft) {
          s[kExpected] = multiply_add(probabilities[c], exponential(v - top[0]), s[kExpected]);
          if (v == top[0]) first[0] = minimum(first[0], c);
          if (probabilities[c] == top[1]) first[1] = minimum(first[1], c);
        }
      });
    }
  }
  held.template visit<true>([&](C& v, int) {
    const C difference = v - top[0];
    v = exponential(difference);
    s[kZ] += v;
    s[kEnergy] = multiply_add(v, maximum(difference, Constants<C>::lowest), s[kEnergy]);
  });

  if constexpr (kDense) {
    reduce_row<kFamily>(s, p, buffers.sums, C(0), Add());
    if (soft) reduce_row<kFamily>(first, p, buffers.first, held.classes, Minimum());
  } else if (extra) {
    C some[5] = {s[kZ], s[kEnergy], s[kEarlier], s[kBelow], s[kAbsolute]};
    reduce_row<kFamily>(some, p, buffers.sums, C(0), Add());
    for (int i = 0; i < 5; ++i) s[i] = some[i];
  } else {
    C some[3] = {s[kZ], s[kEnergy], s[kEarlier]};
    reduce_row<kFamily>(some, p, buffers.sums, C(0), Add());
    for (int i = 0; i < 3; ++i) s[i] = some[i];
  }

  // log p_c = x_c - top - log Z, H = log Z - sum p_c (x_c - top). A certain prediction has Z = 1 and H = 0
  // exactly.
  const C inverse = reciprocal(s[kZ]);
  const C log_z = log(s[kZ]);
  C entropy = log_z - s[kEnergy] * inverse;
  if (entropy < C(0)) entropy = C(0);  // rounding only; a NaN stays
  const C target_p = exponential(target_logit - top[0]) * inverse;
  C loss, mass, dependence;
  bool correct;
  if (soft) {
    loss = s[kMass] * log_z - s[kCross];
    mass = s[kMass];
    dependence = s[kExpected] * inverse;
    correct = first[0] == first[1];
  } else {
    loss = target_share * (log_z - (target_logit - top[0]));
    mass = target_share;
    if (kDense) {
      loss += s[kMass] * log_z - s[kCross];
      mass += s[kMass];
    } else if (smoothing > C(0)) {  // sum over all classes of -log p
      loss += uniform * (C(a.classes) * log_z - s[kBelow]);
      mass = C(1);
    }
    dependence = target_p;
    correct = target_logit == top[0] && s[kEarlier] == C(0);
  }
  if (l1) dependence = s[kAbsolute];
  const C poison = target.bad ? C(NAN) : C(0);
  loss += poison;
  mass += poison;

  if (target.valid) {
    const C row_sums[kSums] = {
        loss, divisor, C(1), (correct ? C(1) : C(0)) + poison, entropy + poison, dependence + poison};
    sums.add(row_sums, held.place());
  }

  // Gradient: scale (p_c sum_k t_k - t_c) with t the target's distribution; sum_k t_k = 1 without class
  // weights.
  if (writes) {
    G* grad = grad_row();
    const C slope = scale * mass * inverse;
    const C at_target =
        scale * (mass * target_p - target_share - (kDense ? (soft ? C(0) : spread(target.index)) : uniform));
    if constexpr (kFamily == kSmall) {
      held.emit(grad, top[0], [&](C power, int c) {
        if (!target.valid) return C(0);
        if (!soft && c == target.index) return at_target;
        return multiply_add(power, slope, -scale * (kDense ? spread(c) : uniform));
      });
    } else {
      const C offset = -scale * uniform;
      held.emit(grad, top[0], [&](C power, int c) {
        return multiply_add(power, slope, kDense ? -scale * spread(c) : offset);
      });
      // The same thread overwrites its own store, once per row, instead of comparing every class with the
      // target.
      if (!soft && held.owns(target.index)) grad[target.index] = Narrow<G>::from(at_target);
    }
  }
  return target.valid ? loss : C(0);
}

// ---- the kernel ------------------------------------------------------------------------------------------

// Not inlined, or what it needs takes registers from the loop over the rows.
template <typename C>
__device__ __noinline__ void finish_block(const ForwardParams<C>& p) {
  __shared__ C packed[packed_length(kMaxBranches - 1)];
  const ForwardArgs& a = p.args;
  const int modalities = a.branches - 1, columns = kSums * a.branches, blocks = gridDim.x;
  C* sums = packed + packed_offset<kPackedSums>(modalities);
  for (int column = threadIdx.x / 32; column < columns; column += blockDim.x / 32) {
    C sum[1] = {C(0)};
    for (int i = threadIdx.x % 32; i < blocks; i += 32)
      sum[0] += __ldcg(p.partials + int64_t(column) * blocks + i);
    reduce_warp(sum, Add());
    if (threadIdx.x % 32 == 0) sums[column] = sum[0];
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const auto gamma = [&](int modality) { return gamma_of<C>(a.schedule, modality); };
    const bool warming = is_warming(a.schedule);
    const C total =
        finish(sums, modalities, gamma, temperature_of<C>(a.schedule), warming, a.options, packed, Warp());
    if (threadIdx.x == 0) {
      if (a.options.reduction != kNoReduction) *static_cast<C*>(a.loss) = total;
      *p.ticket = 0;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < packed_length(modalities); i += blockDim.x)
    static_cast<C*>(a.packed)[i] = packed[i];
}

// Adds up a branch's sums over the threads of the block, and writes them. The buffer is [kSums, 32].
template <typename C>
__device__ inline void add_block(const ForwardParams<C>& p, int branch, C (&sums)[kSums], C* buffer) {
  reduce_block(sums, buffer, C(0), Add());
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSums; ++i)
      p.partials[(int64_t(i) * p.args.branches + branch) * gridDim.x + blockIdx.x] = sums[i];
  }
}

// finish_block in the block that comes last.
template <typename C>
__device__ inline void finish_if_last(const ForwardParams<C>& p) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // the partial sums are visible before the ticket says so
    last = atomicAdd(p.ticket, 1u) == gridDim.x * gridDim.y - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) finish_block<C>(p);
}

template <typename T, int kFamily, bool kDense, typename C = typename Element<T>::Compute>
__global__ void __launch_bounds__(
    kFamily == kBlock ? resident_threads(kFamily, kDense || sizeof(T) == 8) : kRowsThreads,
    kFamily == kBlock ? 1 : resident_threads(kFamily, kDense || sizeof(T) == 8) / kRowsThreads)
    forward_kernel(const __grid_constant__ ForwardParams<C> p) {
  __shared__ RowBuffers<C> buffers;
  __shared__ C block_sums[kSums * 32];
  const ForwardArgs& a = p.args;
  const int rows_per_block = kFamily == kBlock ? 1 : blockDim.x / p.threads_per_row;
  const int own = kFamily == kBlock ? 0 : threadIdx.x / p.threads_per_row;
  const bool leads =
      kFamily == kBlock ? threadIdx.x == 0 && cluster_rank() == 0 : threadIdx.x % p.threads_per_row == 0;
  const int team = kFamily == kBlock ? blockIdx.x / p.cluster : blockIdx.x;
  if (kFamily == kBlock && p.cluster > 1) cluster_barrier();  // nobody writes to a block that has not begun

  for (int branch = blockIdx.y; branch < a.branches; branch += gridDim.y) {
    C scale = C(0);
    BranchSums<C, kFamily> sums;
    for (int64_t base = int64_t(team) * rows_per_block; base < a.rows;
         base += int64_t(p.teams) * rows_per_block) {
      const int64_t row = base + own;
      const bool inside = row < a.rows;
      RowOf<T, kFamily> held(p);
      const RowTarget target = load_row<T, kFamily>(a, branch, row, inside, held);
      if constexpr (kFamily == kBlock) {
        const int64_t next = row + p.teams;
        if (next < a.rows && read_target(a, branch, next).valid) held.prefetch(row_of<T>(a, branch, next));
      }
      if (base == int64_t(team) * rows_per_block) {  // while the first row is on its way
        const C gamma = branch == 0 ? C(1) : gamma_of<C>(a.schedule, branch - 1);
        scale = gamma / gradient_divisor(p, branch, block_sums);
      }
      const C loss =
          process_row<T, kFamily, kDense>(p, branch, row, inside, target, held, scale, buffers, sums);
      // Per-row loss: one thread adds up the branches of a row, one after the other.
      if (a.options.reduction == kNoReduction && leads && inside) {
        C* out = static_cast<C*>(a.loss) + row;
        *out = branch == 0 ? loss : *out + scale * loss;  // the divisor is 1
      }
    }
    C total[kSums];
    sums.spread(total);
    __syncthreads();  // block_sums held the divisor
    add_block(p, branch, total, block_sums);
  }
  finish_if_last(p);
}

// What every launch is given: the parts of the workspace, and a counter that is zero.
template <typename C>
int prepare(const ForwardArgs& args, const Plan& plan, void* stream, ForwardParams<C>& params) {
  params.args = args;
  char* workspace = static_cast<char*>(args.workspace);
  params.partials = reinterpret_cast<C*>(workspace + kTicketBytes);
  params.divisors = params.partials + int64_t(kSums) * args.branches * plan.grid_x;
  params.smoothing = C(args.options.label_smoothing);
  params.uniform = C(args.options.label_smoothing / double(args.classes));
  params.count_blocks = plan.count_blocks;
  params.threads_per_row = plan.threads_per_row;
  params.shared_vectors = plan.shared_vectors;
  params.cluster = plan.cluster;
  params.teams = plan.grid_x / plan.cluster;
  params.grad = args.grads[0] != nullptr;
  if (const int error = take_ticket(stream, &params.ticket)) return error;
  if (params.ticket == nullptr) {
    params.ticket = reinterpret_cast<unsigned*>(workspace);
    const cudaError_t error =
        cudaMemsetAsync(workspace, 0, sizeof(unsigned), static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return without_trace(error);
  }
  return cudaSuccess;
}

// Enqueues the launches for one dtype. Instantiated in forward_*.cu, so that the dtypes compile in parallel.
template <typename T, typename C = typename Element<T>::Compute>
int launch_forward(const ForwardArgs& args, const Plan& plan, bool dense, void* stream) {
  using Kernel = void (*)(ForwardParams<C>);
  ForwardParams<C> params;
  if (const int error = prepare(args, plan, stream, params)) return error;
  if (plan.count_blocks > 0) {
    const Kernel kernel = count_kernel<C>;
    if (const int error =
            launch(kernel, dim3(plan.count_blocks, args.branches), kRowsThreads, 0, stream, params))
      return error;
  }
  Kernel kernel = dense ? forward_kernel<T, kBlock, true> : forward_kernel<T, kBlock, false>;
  if (plan.family == kSmall)
    kernel = dense ? forward_kernel<T, kSmall, true> : forward_kernel<T, kSmall, false>;
  if constexpr (sizeof(T) < sizeof(double)) {
    if (plan.family == kWarp) kernel = forward_kernel<T, kWarp, false>;
  }
  const int shared_bytes = plan.shared_vectors * plan.threads * kVectorBytes;
  return launch(kernel, dim3(plan.grid_x, plan.grid_y), plan.threads, shared_bytes, stream, params,
                plan.cluster);
}

int forward_labels(const ForwardArgs& args, const Plan& plan, void* stream);  // labels.cu

extern template int launch_forward<double>(const ForwardArgs&, const Plan&, bool, void*);
extern template int launch_forward<float>(const ForwardArgs&, const Plan&, bool, void*);
extern template int launch_forward<__nv_bfloat16>(const ForwardArgs&, const Plan&, bool, void*);
extern template int launch_forward<__half>(const ForwardArgs&, const Plan&, bool, void*);

}  // namespace cuda
}  // namespace arl
