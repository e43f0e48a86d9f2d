// Many classes with a gradient, or soft targets: one row at a time.
#pragma once

#include "chunk.h"

namespace arl::ARL_ISA {

// One row, whose largest logit `top_of_row` holds; if the chunk has `more` rows, that of the next one takes
// its place. `General`: soft targets or label smoothing, whose target distribution is kept in scratch as
// well. The gradient is written if `Keep`.
template <class T, class S, class G, bool General, bool Keep>
ARL_ROWS void wide_row(const Loss& loss, int branch, int64_t row, bool more, T* top_of_row, T* scratch,
                       T* target_row, Chunk<T>& chunk, int i) {
  constexpr int L = Vector<T>::lanes;
  const int64_t classes = loss.classes;
  const int64_t rest = classes % L;
  const S* x = static_cast<const S*>(loss.logits[branch]) + row * loss.row_stride[branch];
  const S* next = row + 1 < loss.rows ? x + loss.row_stride[branch] : x;
  const S* after_next = row + 2 < loss.rows ? next + loss.row_stride[branch] : next;
  G* grad = Keep ? static_cast<G*>(loss.grad[branch]) + row * classes : nullptr;
  const bool streams = Keep && loss.streams && can_stream<T>(grad);
  const G* next_grad = Keep && row + 1 < loss.rows ? grad + classes : grad;
  const T top = *top_of_row;
  if (!loss.valid(branch, row)) {
    skip_row(chunk, i);
    if (more) *top_of_row = row_top<T>(next, classes);
    for (int64_t c = 0; Keep && c < classes; ++c) grad[c] = G{};
    return;
  }

  const T* soft =
      loss.soft_target == nullptr ? nullptr : static_cast<const T*>(loss.soft_target) + row * classes;
  const int64_t y = soft == nullptr ? loss.target[row] : first_largest(soft, classes);

  // A = sum_c t_c, B = sum_c t_c (x_c - top); the class index is added to the smooth part of t by hand
  const T on_class = soft == nullptr ? T(1 - loss.label_smoothing) * weight_of<T>(loss, y) : T(0);
  T a = on_class, b = soft == nullptr ? on_class * (to_float(x[y]) - top) : T(0);
  if (General) {
    const T keep = T(1 - loss.label_smoothing), smooth = T(loss.label_smoothing / double(classes));
    const T* weight = static_cast<const T*>(loss.weight);
    if (soft != nullptr) {
      for (int64_t c = 0; c < classes; ++c) target_row[c] = soft[c] * keep + smooth;
      if (weight != nullptr) {
        for (int64_t c = 0; c < classes; ++c) target_row[c] *= weight[c];
      }
    }
    V<T> a_sum{}, b_sum{};
    int64_t c = 0;
    for (; c + L <= classes; c += L) {
      const V<T> t = load<T>(target_row + c);
      a_sum += t;
      b_sum += t * (load<T>(x + c) - top);
    }
    for (; c < classes; ++c) {
      a += target_row[c];
      b += target_row[c] * (to_float(x[c]) - top);
    }
    a += sum<T>(a_sum);
    b += sum<T>(b_sum);
  }

  // The exponentials; meanwhile the largest logit of the next row is found, the one after it is fetched, and
  // where the next gradient goes. The class index is left out of the sum at first: p_y - 1 = -others / Z
  // keeps its digits as p_y goes to 1.
  constexpr T lowest = -T(__builtin_inf());
  V<T> d_y = splat<T>(to_float(x[y]) - top);
  const bool is_top = d_y[0] == T(0);
  const T e_y = exp_nonpositive<T>(d_y)[0];
  V<T> z0{}, z1{}, e0{}, e1{}, next_top0 = load_last<T>(next, classes, lowest), next_top1 = next_top0;
  const auto exponentials = [scratch](V<T> d, Bits<T> left_out, int64_t at, V<T>& z, V<T>& e) ARL_LAMBDA {
    const V<T> p = left_out ? V<T>{} : exp_nonpositive<T>(d);
    z += p;
    e += p * d;
    store<T>(scratch + at, p);
  };
  const auto is_y = [y](Bits<T> number, int64_t from) ARL_LAMBDA { return number == Lane<T>(y - from); };
  Bits<T> number = class_numbers<T>(0);
  int64_t c = 0;
  for (; c + 2 * L <= classes; c += 2 * L) {
    prefetch(after_next + c, 2 * L);
    if (more) {
      next_top0 = larger<T>(load<T>(next + c), next_top0);
      next_top1 = larger<T>(load<T>(next + c + L), next_top1);
    }
    if (Keep && !streams) prefetch(next_grad + c, 2 * L);
    exponentials(load<T>(x + c) - top, is_y(number, 0), c, z0, e0);
    exponentials(load<T>(x + c + L) - top, is_y(number, L), c + L, z1, e1);
    number += 2 * L;
  }
  if (c + L <= classes) {
    if (more) next_top0 = larger<T>(load<T>(next + c), next_top0);
    exponentials(load<T>(x + c) - top, is_y(number, 0), c, z0, e0);
    c += L;
  }
  if (rest > 0) {
    number = last_numbers<T>(classes);
    const V<T> v = load_last<T>(x, classes, lowest);
    exponentials(v - top, (number < Lane<T>(c)) | is_y(number, 0), c, z1, e1);
  }
  if (more) *top_of_row = largest<T>(larger<T>(next_top0, next_top1));
  const T others = sum<T>(z0 + z1), partition = others + e_y;
  const T inverse = T(1) / partition;

  const T p_y = e_y * inverse;
  T confidence = p_y;
  if (General && soft != nullptr) {  // the expected probability sum_c t_c p_c, of the targets as given
    V<T> expected{};
    for (c = 0; c + L <= classes; c += L) expected += load<T>(soft + c) * load<T>(scratch + c);
    if (rest > 0) expected += load_last<T>(soft, classes, T(0)) * load<T>(scratch + c);
    confidence = (soft[y] * e_y + sum<T>(expected)) * inverse;
  }
  chunk.a[i] = a;
  chunk.b[i] = b;
  chunk.partition[i] = partition;
  chunk.energy[i] = sum<T>(e0 + e1) + e_y * d_y[0];
  chunk.confidence[i] = confidence;
  chunk.l1[i] = loss.logit_l1 ? row_l1<T>(x, classes) : T(0);
  const bool lost = partition != partition;
  chunk.correct[i] =
      lost || (is_top && !(others < T(1))) ? first_largest_is<T, S>(x, classes, y, top, lost) : is_top;

  // d(row loss)/dx_c = A p_c - t_c
  if (!Keep) return;
  const T scale = T(loss.grad_scale[branch]);
  const T factor = a * scale * inverse;
  if (rest > 0) {  // first, since some of its elements have their value elsewhere
    V<T> g = load<T>(scratch + classes - rest) * factor;
    if (General) g -= load_last<T>(target_row, classes, T(0)) * scale;
    store_last<T>(grad, classes, g);
  }
  for (c = 0; c + L <= classes; c += L) {
    V<T> g = load<T>(scratch + c) * factor;
    if (General) g -= load<T>(target_row + c) * scale;
    if (streams) {
      stream(grad + c, g);
    } else {
      store(grad + c, g);
    }
  }
  T g_y = -on_class * others * inverse;
  if (General) g_y = (soft == nullptr ? g_y + (a - on_class) * p_y : a * p_y) - target_row[y];
  grad[y] = from_float<G>(g_y * scale);
}

}  // namespace arl::ARL_ISA
