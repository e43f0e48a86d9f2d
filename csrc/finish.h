// The facts that all kernels share, and finish(): from the sums over a batch to the loss, the statistics and
// the gains.
//
// arl_fast/_core/spec.py and options.py state the same facts for Python; the extension exports these
// (csrc/spec.h), and importing it compares. finish() takes the steps of arl_fast/_core/rules.py, the
// reference. No torch headers here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define ARL_FN __host__ __device__ inline
#else
#define ARL_FN inline
#endif

namespace arl {

// ---- names -----------------------------------------------------------------------------------------------

enum Rule : int { kShare, kPaper, kConstant, kNone, kOgm };
inline constexpr const char* kRules[] = {"share", "paper", "constant", "none", "ogm"};

enum Dependence : int { kConfidence, kLogitL1 };
inline constexpr const char* kDependences[] = {"confidence", "logit_l1"};

enum Gain : int { kResidual, kMeanOne, kPlain };
inline constexpr const char* kGains[] = {"residual", "mean_one", "plain"};

enum Reduction : int { kMean, kSum, kNoReduction };
inline constexpr const char* kReductions[] = {"mean", "sum", "none"};

enum Fusion : int { kConcat, kSumFusion, kShared };
inline constexpr const char* kFusions[] = {"concat", "sum", "shared"};

enum BiasMode : int { kFull, kSplit };
inline constexpr const char* kBiasModes[] = {"full", "split"};

enum Task : int { kMulticlass, kMultilabel };
inline constexpr const char* kTasks[] = {"multiclass", "multilabel"};

// The dtypes of logits, as tables of kernels count them.
enum Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16, kDtypes };

constexpr double kFloor = 0.6;        // the default floor of an entropy share, times the number of modalities
constexpr double kTinyShare = 1e-12;  // keeps 1 / share finite for a floor of 0
constexpr double kHugeRatio = 1e30;   // keeps Eq. 18's ratios finite: inf - inf would be NaN

// Sums over the valid rows of a branch.
enum Sum : int { kLoss, kDivisor, kCount, kCorrect, kEntropy, kDependence, kSums };
inline constexpr const char* kSumNames[kSums] = {"loss",    "divisor", "count",
                                                 "correct", "entropy", "dependence"};

// ---- options ---------------------------------------------------------------------------------------------

// In the order of Python's Options, so that one table describes both.
struct Options {
  int rule;
  int dependence;
  double entropy_floor;  // negative (None): kFloor / number of modalities present
  int gain;
  int64_t ignore_index;
  double label_smoothing;
  int reduction;
  int task;
};

template <size_t n>
constexpr int length_of(const char* const (&)[n]) {
  return int(n);
}

enum class Kind { kChoice, kNumber, kInteger };

struct OptionField {
  const char* name;
  Kind kind;
  size_t offset;  // in Options: an int for kChoice, a double for kNumber, an int64_t for kInteger
  const char* const* choices;  // kChoice: the names ...
  int choice_count;            // ... and how many
  bool optional;               // kNumber: None is legal, ...
  double none;                 // ... and means this
};

inline constexpr OptionField kOptionFields[] = {
    {"rule", Kind::kChoice, offsetof(Options, rule), kRules, length_of(kRules), false, 0},
    {"dependence", Kind::kChoice, offsetof(Options, dependence), kDependences, length_of(kDependences), false,
     0},
    {"entropy_floor", Kind::kNumber, offsetof(Options, entropy_floor), nullptr, 0, true, -1},
    {"gain", Kind::kChoice, offsetof(Options, gain), kGains, length_of(kGains), false, 0},
    {"ignore_index", Kind::kInteger, offsetof(Options, ignore_index), nullptr, 0, false, 0},
    {"label_smoothing", Kind::kNumber, offsetof(Options, label_smoothing), nullptr, 0, false, 0},
    {"reduction", Kind::kChoice, offsetof(Options, reduction), kReductions, length_of(kReductions), false, 0},
    {"task", Kind::kChoice, offsetof(Options, task), kTasks, length_of(kTasks), false, 0},
};

// ---- the packed vector -----------------------------------------------------------------------------------

enum Packed : int {
  kPackedLoss,
  kPackedAccuracy,
  kPackedEntropy,
  kPackedDependence,
  kPackedInverseVariance,
  kPackedDependenceShare,
  kPackedCoefficients,
  kPackedGains,
  kPackedCount,
  kPackedLink,  // gains - 1, the link's gradient
  kPackedSums,  // [kSums, M+1]
  kPackedFields
};

struct PackedField {
  const char* name;
  int per_branch;    // rows of M+1 entries
  int per_modality;  // rows of M entries
};

inline constexpr PackedField kPacked[kPackedFields] = {
    {"loss", 1, 0},
    {"accuracy", 1, 0},
    {"entropy", 0, 1},
    {"dependence", 0, 1},
    {"inverse_variance", 0, 1},
    {"dependence_share", 0, 1},
    {"coefficients", 0, 1},
    {"gains", 0, 1},
    {"count", 1, 0},
    {"link", 0, 1},
    {"sums", kSums, 0},
};

// Rows before a field, of both kinds.
ARL_FN constexpr PackedField packed_before(int field) {
  PackedField before = {"", 0, 0};
  for (int i = 0; i < field; ++i) {
    before.per_branch += kPacked[i].per_branch;
    before.per_modality += kPacked[i].per_modality;
  }
  return before;
}

// Where a field begins; packed_offset<kPackedFields> is the length.
template <int field>
ARL_FN constexpr int packed_offset(int modalities) {
  constexpr PackedField before = packed_before(field);
  return before.per_branch * (modalities + 1) + before.per_modality * modalities;
}
ARL_FN constexpr int packed_length(int modalities) { return packed_offset<kPackedFields>(modalities); }

// ---- the rule --------------------------------------------------------------------------------------------

template <typename T>
ARL_FN T larger(T a, T b) {
  return a > b ? a : b;
}

// Eq. 18's ratios are unbounded: 0/0 counts as a tie, and both stay finite.
template <typename T>
ARL_FN T bounded_ratio(T top, T bottom) {
  if (top == T(0) && bottom == T(0)) return T(1);
  T ratio = top / bottom;
  return ratio > T(kHugeRatio) ? T(kHugeRatio) : ratio;
}

// OGM's gain for a modality with confidence s, from the sum over the others that are present: with
// rho = s / mean of the others, 1 - tanh(alpha rho) = 2 / (1 + exp(2 alpha rho)) if rho > 1, else 1.
template <typename T>
ARL_FN T held_back(T s, T others, T present, T alpha) {
  if (present <= T(1)) return T(1);
  const T rho = bounded_ratio(s, others / (present - T(1)));
  return rho <= T(1) ? T(1) : T(2) / (T(1) + T(exp(T(2) * alpha * rho)));  // a NaN stays
}

// One thread computes everything. csrc/cuda has a warp in its place, whose threads take the modalities in
// turn.
struct OneThread {
  ARL_FN int first() const { return 0; }
  ARL_FN int step() const { return 1; }
  ARL_FN void sync() const {}  // what the others have written can be read
  template <typename T>
  ARL_FN T sum(T value) const {
    return value;
  }
  template <typename T>
  ARL_FN T largest(T value) const {
    return value;
  }
};

// From the sums [kSums, M+1] to the packed vector and the loss; `packed` may hold the sums in place already.
// gamma(m) is the weight of modality m in this step, 1 during the warm-up. For reduction "none" the return
// value is the sum over rows.
template <typename T, typename Gamma, typename Team = OneThread>
ARL_FN T finish(const T* sums, int modalities, const Gamma& gamma, T temperature, bool warming,
                const Options& options, T* packed, const Team& team = Team()) {
  const int branches = modalities + 1, first = team.first(), step = team.step();
  T* loss = packed + packed_offset<kPackedLoss>(modalities);
  T* accuracy = packed + packed_offset<kPackedAccuracy>(modalities);
  T* entropy = packed + packed_offset<kPackedEntropy>(modalities);
  T* dependence = packed + packed_offset<kPackedDependence>(modalities);
  T* q = packed + packed_offset<kPackedInverseVariance>(modalities);
  T* d = packed + packed_offset<kPackedDependenceShare>(modalities);
  T* a = packed + packed_offset<kPackedCoefficients>(modalities);
  T* gains = packed + packed_offset<kPackedGains>(modalities);
  T* count = packed + packed_offset<kPackedCount>(modalities);
  T* link = packed + packed_offset<kPackedLink>(modalities);
  T* sums_out = packed + packed_offset<kPackedSums>(modalities);

  // Eq. 22. All targets ignored: 0/0 = NaN for the fused branch, as torch; an absent modality contributes
  // nothing.
  T fused = T(0), unimodal = T(0), present = T(0), entropy_total = T(0), dependence_total = T(0);
  for (int b = first; b < branches; b += step) {
    const T n = sums[kCount * branches + b];
    const T rows = larger(n, T(1));
    const T loss_sum = sums[kLoss * branches + b];
    count[b] = n;
    accuracy[b] = sums[kCorrect * branches + b] / rows;
    loss[b] = (b == 0 || n > T(0)) ? loss_sum / sums[kDivisor * branches + b] : T(0);
    const T term = options.reduction == kMean ? loss[b] : loss_sum;
    if (b == 0) {
      fused = term;
    } else {
      unimodal += gamma(b - 1) * term;
      present += n > T(0) ? T(1) : T(0);
      entropy[b - 1] = sums[kEntropy * branches + b] / rows;
      dependence[b - 1] = sums[kDependence * branches + b] / rows;
      entropy_total += entropy[b - 1];
      dependence_total += dependence[b - 1];
    }
  }
  team.sync();
  const T total = team.sum(fused) + team.sum(unimodal);
  present = team.sum(present);
  entropy_total = team.sum(entropy_total);
  dependence_total = team.sum(dependence_total);

  // Shares over the modalities present: d (Eq. 4) and, with a floor before the inversion, q (Eq. 17).
  const T modalities_present = larger(present, T(1));
  const T even = T(1) / modalities_present;
  const T floor =
      options.entropy_floor < 0 ? T(kFloor) * even : larger(T(options.entropy_floor), T(kTinyShare));
  T inverse_total = T(0);
  for (int m = first; m < modalities; m += step) {
    const bool here = count[m + 1] > T(0);
    // Statistics that are NaN must stay NaN: both tests let a NaN total take the division.
    T share = !(entropy_total <= T(0)) ? entropy[m] / entropy_total : even;
    if (share < floor) share = floor;
    q[m] = here ? T(1) / share : T(0);
    inverse_total += q[m];
    d[m] = !here ? T(0) : !(dependence_total <= T(0)) ? dependence[m] / dependence_total : even;
  }
  inverse_total = team.sum(inverse_total);

  // Coefficients: a softmax, over the modalities present, of scores that `a` holds meanwhile.
  T top = -INFINITY;
  for (int m = first; m < modalities; m += step) {
    const bool here = count[m + 1] > T(0);
    if (here) q[m] /= inverse_total;  // an absent modality's share is 0, also beside a NaN
    T score = T(0);
    if (options.rule == kShare) {
      score = temperature / T(2) * (q[m] - d[m]);
    } else if (options.rule == kPaper) {  // Eq. 18 with q0/q1 = H1/H0 (Eq. 17) and d0/d1 (Eq. 4)
      const T ratio =
          m == 0 ? bounded_ratio(entropy[1], entropy[0]) : bounded_ratio(dependence[0], dependence[1]);
      score = temperature * ratio;
    }
    a[m] = score;
    if (here) top = larger(top, score);
  }
  top = team.largest(top);
  T power_total = T(0);
  for (int m = first; m < modalities; m += step) {
    a[m] = count[m + 1] > T(0) ? T(exp(a[m] - top)) : T(0);
    power_total += a[m];
  }
  power_total = team.sum(power_total);
  for (int m = first; m < modalities; m += step) {
    const bool here = count[m + 1] > T(0);
    if (here) a[m] /= power_total;
    if (here && options.rule == kOgm) {
      a[m] = held_back(dependence[m], dependence_total - dependence[m], present, temperature);
    }
    T gain = a[m];
    if (options.gain == kResidual) gain = T(1) + a[m];  // Eq. 19
    if (options.gain == kMeanOne) gain = present * a[m];
    if (options.rule == kNone || warming || !here) gain = T(1);
    gains[m] = gain;
    link[m] = gain - T(1);
  }
  if (sums_out != sums) {
    for (int i = first; i < kSums * branches; i += step) sums_out[i] = sums[i];
  }
  return total;
}

}  // namespace arl
