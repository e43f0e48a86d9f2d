// Row and rule mathematics of the loss, once for the CPU and the CUDA kernels.
//
// A kernel reduces each row to a RowResult, adds the rows of a branch up to six sums, and calls finish(): the same
// steps, in the same order, as arl_fast/rules.py, which is the reference. No torch headers here.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ARL_FN __host__ __device__ inline
#else
#define ARL_FN inline
#endif

namespace arl {

enum Rule : int { kShare = 0, kPaper = 1, kConstant = 2, kNone = 3 };
enum Dependence : int { kConfidence = 0, kLogitL1 = 1 };
enum Gain : int { kResidual = 0, kMeanOne = 1, kPlain = 2 };
enum Reduction : int { kMean = 0, kSum = 1, kNoReduction = 2 };

// The types of logits, as tables of kernels count them.
enum Dtype : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kDtypes = 4 };

// Rows of the sums [6, M+1] and the layout of the packed vector: see arl_fast/stats.py.
enum Sum : int { kLoss = 0, kDivisor = 1, kCount = 2, kCorrect = 3, kEntropy = 4, kDependence = 5, kSums = 6 };

ARL_FN constexpr int packed_length(int modalities) { return 16 * modalities + 9; }
ARL_FN constexpr int link_offset(int modalities) { return 9 * modalities + 3; }
ARL_FN constexpr int sums_offset(int modalities) { return 10 * modalities + 3; }

struct Options {
  int rule;
  int dependence;
  int gain;
  int reduction;
  double entropy_floor;  // negative: 0.6 / number of modalities present
  double label_smoothing;
  int64_t ignore_index;
};

template <typename T>
struct Schedule {
  T gamma;
  T temperature;
  bool warming;
};

template <typename T>
ARL_FN Schedule<T> effective(T gamma, T temperature, T warming) {
  return {warming != T(0) ? T(1) : gamma, temperature, warming != T(0)};
}

template <typename T>
ARL_FN T larger(T a, T b) {
  return a > b ? a : b;
}

// Eq. 18's ratios are unbounded: 0/0 counts as a tie, and both stay finite so that inf - inf cannot become NaN.
template <typename T>
ARL_FN T bounded_ratio(T top, T bottom) {
  if (top == T(0) && bottom == T(0)) return T(1);
  T ratio = top / bottom;
  return ratio > T(1e30) ? T(1e30) : ratio;
}

// From the sums [6, M+1] to the packed vector [16M+9] (statistics, gains - 1, the sums again) and the loss; `packed` may
// hold the sums in place already. For reduction "none" the return value is the sum over the rows.
template <typename T>
ARL_FN T finish(const T* sums, int modalities, const Schedule<T>& schedule, const Options& options, T* packed) {
  const int branches = modalities + 1;
  T* loss = packed;
  T* accuracy = loss + branches;
  T* entropy = accuracy + branches;
  T* dependence = entropy + modalities;
  T* q = dependence + modalities;
  T* d = q + modalities;
  T* a = d + modalities;
  T* gains = a + modalities;
  T* count = gains + modalities;
  T* link = count + branches;
  T* sums_out = link + modalities;

  // Eq. 22. All targets ignored: 0/0 = NaN for the fused branch, as torch; an absent modality contributes nothing.
  T total = T(0);
  T unimodal = T(0);
  int present = 0;
  for (int b = 0; b < branches; ++b) {
    const T n = sums[kCount * branches + b];
    const T rows = larger(n, T(1));
    const T loss_sum = sums[kLoss * branches + b];
    count[b] = n;
    accuracy[b] = sums[kCorrect * branches + b] / rows;
    loss[b] = (b == 0 || n > T(0)) ? loss_sum / sums[kDivisor * branches + b] : T(0);
    const T term = options.reduction == kMean ? loss[b] : loss_sum;
    if (b == 0) {
      total = term;
    } else {
      unimodal += term;
      present += n > T(0);
      entropy[b - 1] = sums[kEntropy * branches + b] / rows;
      dependence[b - 1] = sums[kDependence * branches + b] / rows;
    }
  }
  total += schedule.gamma * unimodal;

  // Shares over the modalities present: d (Eq. 4) and, with a floor before the inversion, q (Eq. 17).
  const T modalities_present = T(present > 0 ? present : 1);
  const T floor = options.entropy_floor < 0 ? T(0.6) / modalities_present : larger(T(options.entropy_floor), T(1e-12));
  T entropy_total = T(0), dependence_total = T(0), inverse_total = T(0);
  for (int m = 0; m < modalities; ++m) {
    entropy_total += entropy[m];
    dependence_total += dependence[m];
  }
  for (int m = 0; m < modalities; ++m) {
    const bool here = count[m + 1] > T(0);
    T share = T(1) / modalities_present;
    // NaN statistics must stay NaN: both tests below are written so that a NaN total takes the division
    if (!(entropy_total <= T(0))) share = entropy[m] / entropy_total;
    if (share < floor) share = floor;
    q[m] = here ? T(1) / share : T(0);
    inverse_total += q[m];
    d[m] = !here ? T(0) : (!(dependence_total <= T(0)) ? dependence[m] / dependence_total : T(1) / modalities_present);
  }
  for (int m = 0; m < modalities; ++m) {
    if (count[m + 1] > T(0)) q[m] /= inverse_total;  // an absent modality's share is 0, also beside a NaN
  }

  // Coefficients: a softmax over the modalities present, of scores kept in `a` meanwhile.
  T top = -INFINITY;
  for (int m = 0; m < modalities; ++m) {
    T score = T(0);
    if (options.rule == kShare) {
      score = schedule.temperature / T(2) * (q[m] - d[m]);
    } else if (options.rule == kPaper) {  // Eq. 18 with q0/q1 = H1/H0 (Eq. 17) and d0/d1 (Eq. 4)
      score = schedule.temperature *
              (m == 0 ? bounded_ratio(entropy[1], entropy[0]) : bounded_ratio(dependence[0], dependence[1]));
    }
    a[m] = score;
    if (count[m + 1] > T(0)) top = larger(top, score);
  }
  T power_total = T(0);
  for (int m = 0; m < modalities; ++m) {
    a[m] = count[m + 1] > T(0) ? T(exp(a[m] - top)) : T(0);
    power_total += a[m];
  }
  for (int m = 0; m < modalities; ++m) {
    if (count[m + 1] > T(0)) a[m] /= power_total;
    T gain = options.gain == kResidual ? T(1) + a[m] : options.gain == kMeanOne ? T(present) * a[m] : a[m];  // Eq. 19
    if (options.rule == kNone || schedule.warming || !(count[m + 1] > T(0))) gain = T(1);
    gains[m] = gain;
    link[m] = gain - T(1);
  }
  if (sums_out != sums) {
    for (int i = 0; i < kSums * branches; ++i) sums_out[i] = sums[i];
  }
  return total;
}

// What one pass over a row accumulates, with `top` = max_c x_c: Z = sum exp(x_c - top), E = sum exp(x_c - top)(x_c - top).
template <typename T>
struct RowPass {
  T top;
  T partition;  // Z
  T energy;     // E; a logit of -inf adds 0 (0 log 0 = 0)
};

template <typename T>
ARL_FN T row_entropy(const RowPass<T>& row) {  // H = log Z - E/Z, in nats
  const T entropy = log(row.partition) - row.energy / row.partition;
  return entropy < T(0) ? T(0) : entropy;  // rounding only; a NaN stays
}

template <typename T>
ARL_FN T log_probability(const RowPass<T>& row, T logit) {
  return (logit - row.top) - log(row.partition);
}

}  // namespace arl
