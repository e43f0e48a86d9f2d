// Some vectors of classes, or many without a gradient: row after row, and what is left in the lanes of as
// many rows as a vector has lanes is brought together for all of them at once.
#pragma once

#include <type_traits>

#include "chunk.h"

namespace arl::ARL_ISA {

// The lanes of each of L vectors joined: lane i of the result belongs to vector i.
template <class T, class Join>
ARL_INLINE V<T> fold_each(V<T>* v, Join join) {
  constexpr int L = Vector<T>::lanes, piece = 16 / sizeof(T), pieces = L / piece;
  const auto joined = [&join](V<T> a, V<T> b, auto first, auto second)
                          ARL_LAMBDA { return join(shuffle<T>(a, b, first), shuffle<T>(a, b, second)); };
  // within pieces of 16 bytes: [a0 b0 a1 b1] with [a2 b2 a3 b3], then [a0 a1 b0 b1] with [a2 a3 b2 b3]
  for (int i = 0; i < L / 2; ++i) {
    const auto low = [](int lane)
                         ARL_LAMBDA { return lane / piece * piece + lane % piece / 2 + lane % 2 * L; };
    const auto high = [low](int lane) ARL_LAMBDA { return low(lane) + piece / 2; };
    v[i] = joined(v[2 * i], v[2 * i + 1], low, high);
  }
  for (int i = 0; i < L / 4 && piece == 4; ++i) {
    const auto low = [](int lane) ARL_LAMBDA { return lane / 4 * 4 + lane % 2 + lane % 4 / 2 * L; };
    const auto high = [low](int lane) ARL_LAMBDA { return low(lane) + 2; };
    v[i] = joined(v[2 * i], v[2 * i + 1], low, high);
  }
  // whole pieces: halves, then the pieces of each half
  const auto lower = [](int lane) ARL_LAMBDA { return lane < L / 2 ? lane : lane + L / 2; };
  const auto upper = [lower](int lane) ARL_LAMBDA { return lower(lane) + L / 2; };
  if constexpr (pieces == 1) return v[0];
  if constexpr (pieces == 2) return joined(v[0], v[1], lower, upper);
  const auto even = [](int lane) ARL_LAMBDA { return lane - lane / piece % 2 * (piece - L); };
  const auto odd = [even](int lane) ARL_LAMBDA { return even(lane) + piece; };
  return joined(joined(v[0], v[2], lower, upper), joined(v[1], v[3], lower, upper), even, odd);
}

// The largest logit of a row is found while the exponentials of the row so many before are computed, since
// one before would be late.
constexpr int kAhead = 2;
// Logits are asked from memory so many ahead of those in work, in whole rows. A gradient needs cache as well.
constexpr int64_t kFetchAhead = 4096, kFetchAheadWithGradient = 2048;

// Class indices, L classes or more, of `rows` rows, `left` of which the chunk has from here on. `next_tops`
// holds the largest logits of the first kAhead, and then of those behind. The gradient is written if `Keep`.
template <class T, class S, class G, bool Keep>
ARL_ROWS void group_rows(const Loss& loss, int branch, int64_t begin, int rows, int left, T* next_tops,
                         T* scratch, Chunk<T>& chunk, int first) {
  constexpr int L = Vector<T>::lanes;
  constexpr int kLine = 64 / sizeof(S);  // classes in a line of the cache
  const int64_t classes = loss.classes, padded = (classes + L - 1) / L * L;
  const int64_t row_stride = loss.row_stride[branch];
  const S* logits = static_cast<const S*>(loss.logits[branch]) + begin * row_stride;
  const LaneRows<T, S> lanes(loss, branch, begin, rows, logits, row_stride, 1);
  const Bits<T> valid = lanes.valid;
  const uint32_t counted = mask_of<T>(valid);
  const int32_t* target = loss.target + begin;
  const V<T> weighted = lanes.weighted(loss);
  V<T> l1{};
  if (loss.logit_l1) {
    for (int l = 0; l < rows; ++l) l1[l] = row_l1<T>(logits + l * row_stride, classes);
  }
  // act(c, at, last) for each vector of classes, the exponentials of which are kept from c on. It lies at
  // `at`: the last one has some classes for a second time.
  const auto each_vector = [&](const auto& act) ARL_LAMBDA {
    for (int64_t c = 0; c + L < classes; c += L) act(c, c, std::false_type());
    act(padded - L, classes - L, std::true_type());
  };
  const auto add = [](V<T> a, V<T> b) ARL_LAMBDA { return a + b; };

  G* grad = Keep ? static_cast<G*>(loss.grad[branch]) + begin * classes : nullptr;
  if (Keep && loss.far) prefetch(grad, rows * classes);
  const int64_t fetched_rows = kAhead + 1 + (Keep ? kFetchAheadWithGradient : kFetchAhead) / classes;

  // For a gradient the true class is left out of the sums at first: p_y - 1 = -others / Z keeps its digits as
  // p_y goes to 1.
  const V<T> zero{}, one = splat<T>(T(1)), two = one + one;
  V<T> sums[L], energies[L];
  uint32_t ties = 0;  // bit l: row l may have more than one largest logit
  alignas(64) T tops[L + kAhead] = {};
  const S* x = logits;
  const int ahead = rows == 1 ? 0 : kAhead;  // a chunk of one long row has none behind it
  for (int l = 0; l < kAhead; ++l) tops[l] = next_tops[l];
  for (int l = 0; l < L; ++l) {
    if (l >= rows) {
      sums[l] = energies[l] = V<T>{};
      continue;
    }
    const S* next = l + ahead < left ? x + ahead * row_stride : x;
    if (!Keep && (counted >> l & 1) == 0) {  // ignored or absent
      sums[l] = energies[l] = V<T>{};
      tops[l + kAhead] = row_top<T>(next, classes);
      x += row_stride;
      continue;
    }
    const S* later = x + fetched_rows * row_stride;
    const V<T> own_top = splat<T>(tops[l]);
    V<T> z{}, e{}, next_top = splat<T>(-T(__builtin_inf()));
    each_vector([&](int64_t c, int64_t at, auto last) ARL_LAMBDA {
      if (L == kLine || c % kLine == 0) prefetch(later + at, 1);
      next_top = larger<T>(load<T>(next + at), next_top);
      V<T> d = load<T>(x + at) - own_top;
      V<T> p = exp_nonpositive<T>(d);
      if (Keep || decltype(last)::value) {
        const Bits<T> number = class_numbers<T>(at);
        if (Keep) p = number == Lane<T>(target[l]) ? V<T>{} : p;
        if (decltype(last)::value) p = number < Lane<T>(c) ? V<T>{} : p;
      }
      z += p;
      e += p * d;
      if (Keep) store<T>(scratch + l * padded + c, p);
    });
    sums[l] = z;
    energies[l] = e;
    tops[l + kAhead] = largest<T>(next_top);
    // A largest logit adds 1 to the sum of its lane: a second one makes another lane's sum 1, or this one's
    // 2. With a gradient the true class adds nothing. No branch: it would be mispredicted.
    const uint32_t full = mask_of<T>(z >= one);
    const uint32_t second = Keep ? full : (full & (full - 1)) | mask_of<T>(z >= two);
    ties |= uint32_t(second != 0) << l;
    x += row_stride;
  }
  for (int l = 0; l < kAhead; ++l) next_tops[l] = tops[L + l];
  const V<T> top = load<T>(tops);
  V<T> partition = fold_each<T>(sums, add), energy = fold_each<T>(energies, add);
  const V<T> d_y = load<T>(lanes.x_y) - top;
  V<T> bounded = d_y;
  const V<T> e_y = exp_nonpositive<T>(bounded);
  const V<T> others = partition;  // than the true class, where a gradient is written
  if (Keep) {
    partition += e_y;
    energy += e_y * bounded;
  }
  const V<T> inverse = T(1) / partition, p_y = e_y * inverse;

  uint32_t right = mask_of<T>(d_y == zero);
  const uint32_t lost = mask_of<T>(partition != partition);
  uint32_t unsure = counted & (lost | (right & ties));
  for (; unsure != 0; unsure &= unsure - 1) {
    const int l = __builtin_ctz(unsure);
    const bool is_first =
        first_largest_is<T, S>(logits + l * row_stride, classes, target[l], tops[l], lost >> l & 1);
    right = (right & ~(1u << l)) | uint32_t(is_first) << l;
  }

  const T smooth = T(loss.label_smoothing / double(classes));
  V<T> smooth_b{};
  if (loss.label_smoothing != 0) {
    for (int l = 0; l < L; ++l) sums[l] = zero;
    for (int l = 0; l < rows; ++l) {
      each_vector([&](int64_t c, int64_t at, auto last) ARL_LAMBDA {
        V<T> b = weights_of<T>(loss, at) * (load<T>(logits + l * row_stride + at) - tops[l]);
        if (decltype(last)::value) b = class_numbers<T>(at) < Lane<T>(c) ? zero : b;
        sums[l] += b;
      });
    }
    smooth_b = smooth * fold_each<T>(sums, add);
  }
  const V<T> a = weighted + smooth * T(loss.weight_total);
  keep_rows<T>(chunk, first, valid, a, weighted * d_y + smooth_b, partition, energy, p_y, l1,
               lanes_of<T>(right));

  // d(row loss)/dx_c = A p_c - t_c
  if (!Keep) return;
  const T scale = T(loss.grad_scale[branch]);
  alignas(64) T factors[L], g_ys[L];
  store<T>(factors, a * scale * inverse);
  store<T>(g_ys, ((a - weighted) * p_y - weighted * (others * inverse)) * scale);
  for (int l = 0; l < rows; ++l, grad += classes) {
    if (!loss.valid(branch, begin + l)) {
      for (int64_t c = 0; c < classes; ++c) grad[c] = G{};
      continue;
    }
    const T factor = factors[l];
    const auto write = [&](int64_t c, int64_t at) ARL_LAMBDA {
      V<T> g = load<T>(scratch + l * padded + c) * factor;
      if (loss.label_smoothing != 0) g -= smooth * scale * weights_of<T>(loss, at);
      store(grad + at, g);
    };
    write(padded - L, classes - L);  // first, since some of its elements have their value elsewhere
    for (int64_t c = 0; c + L < classes; c += L) write(c, c);
    T g_y = g_ys[l];
    if (loss.label_smoothing != 0) g_y -= smooth * scale * weight_of<T>(loss, target[l]);
    grad[target[l]] = from_float<G>(g_y);
  }
}

}  // namespace arl::ARL_ISA
