// Task "multilabel": every logit x is a yes or no of its own, and every pair of a row and a label t counts by itself.
// One pass over the logits: statistics and gradient of each pair (the formulas of
// arl_fast/implementations/multilabel.py).
//
// With a = |x|, e = exp(-a) and l = log(1 + e) nothing overflows and nothing cancels: the more probable answer has the
// probability 1 / (1 + e) and minus log of it is l; the other one has e / (1 + e), and a + l.
#pragma once

#include "loss.h"
#include "vec.h"

namespace arl::ARL_ISA {

using cpu::ChunkSums;
using cpu::Loss;

// log(1 + e) for e in [0, 1], to the last digits also where 1 + e rounds to 1: with s = e / (2 + e), 2 atanh(s) =
// 2 (s + s^3 / 3 + s^5 / 5 + ...); the first term left out is below 3e-9 s, for double below 4e-18 s.
template <class T>
ARL_INLINE V<T> log_one_plus(V<T> e) {
  constexpr int last = sizeof(T) == 4 ? 15 : 35;
  const V<T> s = e / (T(2) + e), z = s * s;
  V<T> r = splat<T>(T(2) / T(last));
  for (int odd = last - 2; odd >= 1; odd -= 2) r = r * z + T(2) / T(odd);
  return r * s;
}

template <bool flag>
struct Constant {
  static constexpr bool value = flag;
};

template <class T>
struct PairSums {
  V<T> loss, correct, entropy, dependence;
};

// A vector of pairs: logits, labels, and the weights of a yes and a no. Labels of NaN are not known unless
// `Known` says that there are none; of such a pair nothing is added, and loss and gradient are 0.
template <class T, bool Known, bool Weighted>
ARL_INLINE void pairs(V<T> x, V<T> t, V<T> yes_weight, V<T> no_weight, bool logit_l1, T scale, PairSums<T>& sums,
                      V<T>& loss, V<T>& gradient) {
  const V<T> zero{}, one = splat<T>(T(1));
  const Bits<T> known = t == t;
  V<T> s = one - t;
  if (!Known) {
    x = known ? x : zero;
    t = known ? t : zero;
    s = known ? s : zero;
  }
  const V<T> a = absolute<T>(x);
  V<T> d = -a;
  const V<T> e = exp_nonpositive<T>(d);  // d is bounded now: d e is 0 where a is infinite
  const V<T> l = log_one_plus<T>(e);
  const V<T> larger_p = one / (one + e), smaller_p = e * larger_p;
  // Shares of the label on the answer that x speaks for and on the other one, and the same times their weights.
  const Bits<T> says_no = x < zero;
  const V<T> agrees = says_no ? s : t, differs = says_no ? t : s;
  V<T> u = agrees, v = differs;
  if (Weighted) {
    u *= says_no ? no_weight : yes_weight;
    v *= says_no ? yes_weight : no_weight;
  }
  loss = (u + v) * l + v * a;
  const V<T> g = (v * larger_p - u * smaller_p) * scale;  // scale d loss / d a
  gradient = says_no ? -g : g;
  V<T> entropy = l - d * smaller_p;
  V<T> dependence = a;
  if (!logit_l1) dependence = agrees * larger_p + differs * smaller_p;  // the probability of the true value
  const V<T> is_yes = t > splat<T>(T(0.5)) ? one : zero;
  V<T> correct = x > zero ? is_yes : one - is_yes;
  if (!Known) {
    entropy = known ? entropy : zero;
    correct = known ? correct : zero;
    gradient = known ? gradient : zero;  // the scale is infinite where no pair counts
  }
  sums.loss += loss;
  sums.correct += correct;
  sums.entropy += entropy;
  sums.dependence += dependence;
}

// Logits, labels and results that lie without gaps, of modalities that are present; `column` is the first one's class.
template <class T, class S, class G, bool Known, bool Weighted>
ARL_INLINE void stretch(const Loss& loss, const S* x, const T* t, int64_t count, int64_t column, T scale, G* grad,
                        T* pair_loss, PairSums<T>& sums) {
  constexpr int L = Vector<T>::lanes;
  constexpr int64_t ahead = 16 * L;
  const int64_t step = L % loss.classes;
  const V<T> zero{};
  int64_t i = 0;
  const auto take = [&](auto known, V<T> logits, V<T> labels, V<T>& own, V<T>& gradient) ARL_LAMBDA {
    V<T> yes = zero, no = zero;
    if (Weighted) {
      yes = load<T>(static_cast<const T*>(loss.yes_weight) + column);
      no = load<T>(static_cast<const T*>(loss.no_weight) + column);
      column += step;
      if (column >= loss.classes) column -= loss.classes;
    }
    pairs<T, decltype(known)::value, Weighted>(logits, labels, yes, no, loss.logit_l1, scale, sums, own, gradient);
  };
  for (; i + L <= count; i += L) {
    if (i + ahead < count) {
      prefetch<L>(x + i + ahead);
      prefetch<L>(t + i + ahead);
      if (grad != nullptr) prefetch<L>(grad + i + ahead);
    }
    V<T> own, gradient;
    take(Constant<Known>(), load<T>(x + i), load<T>(t + i), own, gradient);
    if (grad != nullptr) store(grad + i, gradient);
    if (pair_loss != nullptr) store<T>(pair_loss + i, own);
  }
  if (i == count) return;
  V<T> own, gradient;  // behind the last pair lie labels that are not known
  take(Constant<false>(), load_last<T>(x + i, count - i, T(0)), load_last<T>(t + i, count - i, T(__builtin_nan(""))), own,
       gradient);
  if (grad != nullptr) store_last<T>(grad + i, count - i, gradient);
  if (pair_loss != nullptr) store_last<T>(pair_loss + i, count - i, own);
}

template <class T, class S, class G, bool Known, bool Weighted>
static void chunk_of_pairs(const Loss& loss, int branch, int64_t begin, int64_t end, ChunkSums* sums) {
  const int64_t classes = loss.classes;
  const S* x = static_cast<const S*>(loss.logits[branch]);
  const T* t = static_cast<const T*>(loss.soft_target);
  G* grad = static_cast<G*>(loss.grad[branch]);
  T* pair_loss = static_cast<T*>(loss.row_loss);
  if (pair_loss != nullptr) pair_loss += branch * loss.rows * classes;
  const bool adjacent = loss.row_stride[branch] == classes;
  PairSums<T> totals{};
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / classes, column = at - row * classes;
    const bool present = loss.present(branch, row);
    int64_t next = row + 1;  // adjacent rows of which all or none are present are one stretch
    if (adjacent && (branch == 0 || loss.mask == nullptr)) next = loss.rows;
    while (adjacent && next * classes < end && loss.present(branch, next) == present) ++next;
    const int64_t stop = next * classes < end ? next * classes : end;
    if (present) {
      stretch<T, S, G, Known, Weighted>(loss, x + row * loss.row_stride[branch] + column, t + at, stop - at, column,
                                        T(loss.grad_scale[branch]), grad == nullptr ? nullptr : grad + at,
                                        pair_loss == nullptr ? nullptr : pair_loss + at, totals);
    } else {
      for (int64_t i = at; i < stop && grad != nullptr; ++i) grad[i] = G{};
      for (int64_t i = at; i < stop && pair_loss != nullptr; ++i) pair_loss[i] = T(0);
    }
    at = stop;
  }
  sums->of[kLoss] = double(sum<T>(totals.loss));
  sums->of[kCorrect] = double(sum<T>(totals.correct));
  sums->of[kEntropy] = double(sum<T>(totals.entropy));
  sums->of[kDependence] = double(sum<T>(totals.dependence));
}

// Pairs [begin, end) of one branch, in the order of rows: their gradients, and their share of the sums.
template <class T, class S, class G>
static void labels(const Loss& loss, int branch, int64_t begin, int64_t end, void*, ChunkSums* sums) {
  const auto run = loss.all_known ? loss.yes_weight == nullptr ? &chunk_of_pairs<T, S, G, true, false>
                                                               : &chunk_of_pairs<T, S, G, true, true>
                   : loss.yes_weight == nullptr ? &chunk_of_pairs<T, S, G, false, false>
                                                : &chunk_of_pairs<T, S, G, false, true>;
  run(loss, branch, begin, end, sums);
}

// How many labels are known, or -1 if one is outside of [0, 1].
template <class T>
static int64_t known(const void* labels, int64_t begin, int64_t end) {
  constexpr int L = Vector<T>::lanes;
  const T* t = static_cast<const T*>(labels);
  Bits<T> unknown{}, wrong{};  // -1 for each
  const auto look = [&](V<T> v) ARL_LAMBDA {
    unknown += v != v;
    wrong |= (v < T(0)) | (v > T(1));
  };
  int64_t i = begin;
  for (; i + L <= end; i += L) look(load<T>(t + i));
  if (i < end) look(load_last<T>(t + i, end - i, T(0)));
  int64_t count = end - begin;
  for (int lane = 0; lane < L; ++lane) count += unknown[lane];
  return any<T>(wrong) ? -1 : count;
}

}  // namespace arl::ARL_ISA
