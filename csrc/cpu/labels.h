// Task "multilabel": every logit x is a yes or no of its own, and each pair of a row and a label t counts by
// itself. One pass over the logits: statistics and gradient of each pair, by the formulas of
// arl_fast/implementations/multilabel.py.
//
// With a = |x|, e = exp(-a) and l = log(1 + e) nothing overflows and nothing cancels. The answer that x
// speaks for has the probability 1 / (1 + e), minus log of it is l; the other one has e / (1 + e), and a + l.
#pragma once

#include "loss.h"
#include "vec.h"

namespace arl::ARL_ISA {

using cpu::ChunkSums;
using cpu::Loss;

// log(1 + e) for e in [0, 1], to the last digits also where 1 + e rounds to 1: with s = e / (2 + e) it is
// 2 atanh(s) = 2 (s + s^3 / 3 + s^5 / 5 + ...). What is left out is below 1e-9 s, for double 1e-18 s.
template <class T>
ARL_INLINE V<T> log_one_plus(V<T> e) {
  constexpr int last = sizeof(T) == 4 ? 15 : 35;
  const V<T> s = e / (T(2) + e), z = s * s;
  V<T> r = splat<T>(T(2) / T(last));
  for (int odd = last - 2; odd >= 1; odd -= 2) r = r * z + T(2) / T(odd);
  return r * s;
}

template <class T>
struct PairSums {
  V<T> loss, correct, entropy, dependence;
};

template <class T>
struct Pairs {
  V<T> loss, gradient;
};

// A vector of pairs, with the weights of a yes and of a no if `Weighted`. A label that is NaN is not known,
// unless `Known` says that there is none: such a pair adds nothing, and its loss and gradient are 0.
template <class T, bool Known, bool Weighted>
ARL_INLINE Pairs<T> take(V<T> x, V<T> t, V<T> yes_weight, V<T> no_weight, T scale, bool logit_l1,
                         PairSums<T>& sums) {
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

  // What of the label is on the answer that x speaks for, and on the other one; then the same with weights.
  const Bits<T> says_no = x < zero;
  const V<T> agrees = says_no ? s : t, differs = says_no ? t : s;
  V<T> u = agrees, v = differs;
  if (Weighted) {
    u *= says_no ? no_weight : yes_weight;
    v *= says_no ? yes_weight : no_weight;
  }
  const V<T> loss = (u + v) * l + v * a;
  const V<T> slope = (v * larger_p - u * smaller_p) * scale;  // the gradient of a
  V<T> gradient = says_no ? -slope : slope;

  V<T> entropy = l - d * smaller_p;
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
  sums.dependence += logit_l1 ? a : agrees * larger_p + differs * smaller_p;
  return {loss, gradient};
}

// Pairs without gaps of modalities that are present, the first one of class `column`. Null: not wanted.
template <class T, class S, class G>
struct Stretch {
  const S* x;
  const T* t;
  G* grad;
  T* loss;
  int64_t count, column;
};

template <class T, bool Known, bool Weighted, class S, class G>
ARL_INLINE void take_all(const Loss& loss, T scale, Stretch<T, S, G> s, PairSums<T>& sums) {
  constexpr int L = Vector<T>::lanes;
  constexpr int64_t ahead = 16 * L;  // the hardware alone does not fetch in time (measured)
  const int64_t step = L % loss.classes;
  V<T> yes{}, no{};
  const auto next_weights = [&]() ARL_LAMBDA {
    if (!Weighted) return;
    yes = load<T>(static_cast<const T*>(loss.yes_weight) + s.column);
    no = load<T>(static_cast<const T*>(loss.no_weight) + s.column);
    s.column += step;
    if (s.column >= loss.classes) s.column -= loss.classes;
  };
  int64_t i = 0;
  for (; i + L <= s.count; i += L) {
    if (i + ahead < s.count) {
      prefetch(s.x + i + ahead, L);
      prefetch(s.t + i + ahead, L);
      if (s.grad != nullptr) prefetch(s.grad + i + ahead, L);
    }
    next_weights();
    const Pairs<T> pairs =
        take<T, Known, Weighted>(load<T>(s.x + i), load<T>(s.t + i), yes, no, scale, loss.logit_l1, sums);
    if (s.grad != nullptr) store(s.grad + i, pairs.gradient);
    if (s.loss != nullptr) store<T>(s.loss + i, pairs.loss);
  }
  const int64_t rest = s.count - i;
  if (rest == 0) return;
  next_weights();
  const V<T> x = load_last<T>(s.x + i, rest, T(0));
  const V<T> t = load_last<T>(s.t + i, rest, T(__builtin_nan("")));  // the lanes behind the last pair
  const Pairs<T> pairs = take<T, false, Weighted>(x, t, yes, no, scale, loss.logit_l1, sums);
  if (s.grad != nullptr) store_last<T>(s.grad + i, rest, pairs.gradient);
  if (s.loss != nullptr) store_last<T>(s.loss + i, rest, pairs.loss);
}

template <class T, class S, class G, bool Known, bool Weighted>
static void take_chunk(const Loss& loss, int branch, int64_t begin, int64_t end, ChunkSums* sums) {
  const int64_t classes = loss.classes;
  const bool without_gaps = loss.row_stride[branch] == classes;
  const bool all_present = branch == 0 || loss.mask == nullptr;
  G* grad = static_cast<G*>(loss.grad[branch]);
  T* losses = static_cast<T*>(loss.row_loss);
  if (losses != nullptr) losses += branch * loss.rows * classes;
  PairSums<T> total{};
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / classes, column = at - row * classes;
    const bool present = loss.present(branch, row);
    // Rows that lie side by side and of which all or none are present are one stretch.
    int64_t next = without_gaps && all_present ? loss.rows : row + 1;
    while (without_gaps && next * classes < end && loss.present(branch, next) == present) ++next;
    const int64_t stop = next * classes < end ? next * classes : end;
    if (present) {
      const S* x = static_cast<const S*>(loss.logits[branch]) + row * loss.row_stride[branch] + column;
      const T* t = static_cast<const T*>(loss.soft_target) + at;
      const auto from_here = [at](auto* wanted)
                                 ARL_LAMBDA { return wanted == nullptr ? nullptr : wanted + at; };
      const Stretch<T, S, G> stretch = {x, t, from_here(grad), from_here(losses), stop - at, column};
      take_all<T, Known, Weighted>(loss, T(loss.grad_scale[branch]), stretch, total);
    } else {
      for (int64_t i = at; i < stop && grad != nullptr; ++i) grad[i] = G{};
      for (int64_t i = at; i < stop && losses != nullptr; ++i) losses[i] = T(0);
    }
    at = stop;
  }
  sums->of[kLoss] = double(sum<T>(total.loss));
  sums->of[kCorrect] = double(sum<T>(total.correct));
  sums->of[kEntropy] = double(sum<T>(total.entropy));
  sums->of[kDependence] = double(sum<T>(total.dependence));
}

// Pairs [begin, end) of one branch, row by row: their gradients, and their share of the sums.
template <class T, class S, class G>
static void labels(const Loss& loss, int branch, int64_t begin, int64_t end, void*, ChunkSums* sums) {
  if (loss.yes_weight == nullptr) {
    loss.all_known ? take_chunk<T, S, G, true, false>(loss, branch, begin, end, sums)
                   : take_chunk<T, S, G, false, false>(loss, branch, begin, end, sums);
  } else {
    loss.all_known ? take_chunk<T, S, G, true, true>(loss, branch, begin, end, sums)
                   : take_chunk<T, S, G, false, true>(loss, branch, begin, end, sums);
  }
}

// How many labels are known, or -1 if one lies outside of [0, 1].
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
