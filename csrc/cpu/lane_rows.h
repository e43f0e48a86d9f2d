// Few classes, or classes that lie apart in memory: one row per vector lane.
#pragma once

#include "chunk.h"

namespace arl::ARL_ISA {

using cpu::kSingleClasses;

// L classes of L rows from class c on, as a vector per class. If there are `Fewer` than L classes, what
// follows them in memory takes the place of the others, as far as there are rows.
template <class T, class S, bool Fewer>
ARL_INLINE void load_classes(const S* const* x, int64_t c, int64_t classes, V<T>* v) {
  constexpr int L = Vector<T>::lanes;
  for (int l = 0; l < L; ++l) {
    const bool inside = !Fewer || x[l] + L <= x[L - 1] + classes;
    v[l] = inside ? load<T>(x[l] + c) : load_last<T>(x[l], classes, T(0));
  }
  transpose<T>(v);
}

// The reverse, into rows without gaps. A row of fewer classes runs over into the next, which is written after
// it.
template <class T, class G, bool Fewer>
ARL_INLINE void store_classes(G* to, int rows, int64_t c, int64_t classes, V<T>* v) {
  constexpr int L = Vector<T>::lanes;
  transpose<T>(v);
  for (int l = 0; l < L; ++l) {
    if (l >= rows) break;
    if (!Fewer || l * classes + L <= rows * classes) {
      store(to + l * classes + c, v[l]);
    } else {
      store_last<T>(to + l * classes, classes, v[l]);
    }
  }
}

// do_class(j) for L classes, or for all where there are fewer.
template <class T, bool Fewer, class Do>
ARL_INLINE void each_class(int64_t classes, const Do& do_class) {
  constexpr int L = Vector<T>::lanes;
  for (int j = 0; j < L; ++j) {
    if (Fewer && j >= classes) break;
    do_class(j);
  }
}

// How the classes of L rows lie in memory.
enum class Layout {
  kFew,      // row after row, fewer than L classes
  kRows,     // row after row
  kColumns,  // class after class, the rows of a class side by side (loss.positions)
};

// Class indices and few classes, or columns: lane l of every vector belongs to row begin + l. The gradient is
// written if `Keep`.
template <class T, class S, class G, Layout layout, bool Keep>
ARL_ROWS void lane_rows(const Loss& loss, int branch, int64_t begin, int rows, T* scratch, Chunk<T>& chunk,
                        int first) {
  constexpr int L = Vector<T>::lanes;
  constexpr bool kFew = layout == Layout::kFew, kColumns = layout == Layout::kColumns;
  const int64_t classes = loss.classes;
  const int64_t last = classes > L ? classes - L : 0;    // where the last L classes begin
  const int64_t stride = kColumns ? loss.positions : 1;  // of classes
  const S* logits = static_cast<const S*>(loss.logits[branch]);
  logits +=
      kColumns ? begin / stride * loss.row_stride[branch] + begin % stride : begin * loss.row_stride[branch];
  const LaneRows<T, S> lanes(loss, branch, begin, rows, logits, kColumns ? 1 : loss.row_stride[branch],
                             stride);
  const S* const* x = lanes.x;
  const Bits<T> y = lanes.y, valid = lanes.valid;

  G* grad = Keep ? static_cast<G*>(loss.grad[branch]) : nullptr;
  if (Keep) grad += kColumns ? begin / stride * stride * classes + begin % stride : begin * classes;
  if (!kColumns && loss.far) {
    prefetch(logits + L * loss.row_stride[branch], rows * classes);  // of the rows behind these
    if (Keep) prefetch(grad, rows * classes);
  }

  // The first largest logit. A NaN is seen at the end.
  V<T> top = splat<T>(-T(__builtin_inf()));
  Bits<T> where{};
  const auto take = [&](int64_t c, V<T> v) ARL_LAMBDA {
    const Bits<T> above = v > top;
    top = larger<T>(v, top);
    where = above ? Bits<T>{} + Lane<T>(c) : where;
    store<T>(scratch + c * L, v);
  };
  const auto load_class = [&](int64_t c) ARL_LAMBDA {
    V<T> v;
    for (int l = 0; l < L; ++l) v[l] = to_float(x[l][c * stride]);
    return v;
  };
  if (kColumns && rows == L) {
    for (int64_t c = 0; c < classes; ++c) {
      prefetch(x[0] + c * stride + L, L);
      if (Keep && loss.far) prefetch(grad + c * stride, L);
      take(c, load<T>(x[0] + c * stride));
    }
  } else if (kColumns || (kFew && classes <= kSingleClasses)) {
    for (int64_t c = 0; c < classes; ++c) take(c, load_class(c));
  } else {
    for (int64_t from = 0; from < classes; from += L) {
      const int64_t c = from < last ? from : last;
      V<T> v[L];
      load_classes<T, S, kFew>(x, c, classes, v);
      each_class<T, kFew>(classes, [&](int j) ARL_LAMBDA { take(c + j, v[j]); });
    }
  }
  V<T> l1{};
  if (loss.logit_l1) {
    for (int64_t c = 0; c < classes; ++c) l1 += absolute<T>(load<T>(scratch + c * L));
  }
  const T smooth = T(loss.label_smoothing / double(classes));
  V<T> smooth_b{};
  if (loss.label_smoothing != 0) {
    for (int64_t c = 0; c < classes; ++c)
      smooth_b += smooth * weight_of<T>(loss, c) * (load<T>(scratch + c * L) - top);
  }
  // For a gradient the true class is left out of the sums at first: p_y - 1 = -others / Z keeps its digits as
  // p_y goes to 1.
  V<T> others{}, energy{};
  Bits<T> number{};
  for (int64_t c = 0; c < classes; ++c) {
    V<T> d = load<T>(scratch + c * L) - top;
    V<T> e = exp_nonpositive<T>(d);
    if (Keep) e = y == number ? V<T>{} : e;
    others += e;
    energy += e * d;
    if (Keep) store<T>(scratch + c * L, e);
    number += 1;
  }
  const V<T> d_y = load<T>(lanes.x_y) - top;
  V<T> bounded = d_y;
  const V<T> e_y = exp_nonpositive<T>(bounded);
  V<T> partition = others;
  if (Keep) {
    partition += e_y;
    energy += e_y * bounded;
  }
  const V<T> p_y = e_y / partition;
  if (any<T>(partition != partition)) {  // a NaN counts as the largest, as in torch.argmax
    for (int l = 0; l < rows; ++l) {
      if (partition[l] == partition[l]) continue;
      int64_t c = 0;
      while (c < classes && to_float(x[l][c * stride]) == to_float(x[l][c * stride])) ++c;
      if (c < classes) where[l] = Lane<T>(c);
    }
  }

  const V<T> weighted = lanes.weighted(loss);
  const V<T> a = weighted + smooth * T(loss.weight_total);
  keep_rows<T>(chunk, first, valid, a, weighted * d_y + smooth_b, partition, energy, p_y, l1, where == y);

  // d(row loss)/dx_c = A p_c - t_c
  if (!Keep) return;
  const T scale = T(loss.grad_scale[branch]);
  const V<T> factor = a * scale / partition;
  const V<T> g_y = ((a - weighted) * p_y - weighted * (others / partition)) * scale;
  const auto gradient = [&](int64_t c) ARL_LAMBDA {
    V<T> g = y == Lane<T>(c) ? g_y : load<T>(scratch + c * L) * factor;
    if (loss.label_smoothing != 0) g -= smooth * weight_of<T>(loss, c) * scale;
    return valid ? g : V<T>{};
  };
  if (kColumns && rows == L) {
    for (int64_t c = 0; c < classes; ++c) store(grad + c * stride, gradient(c));
    return;
  }
  if (kColumns || (kFew && classes <= kSingleClasses)) {
    const int64_t next = kColumns ? 1 : classes;
    for (int64_t c = 0; c < classes; ++c) store<T>(scratch + c * L, gradient(c));
    for (int l = 0; l < rows; ++l) {
      for (int64_t c = 0; c < classes; ++c) {
        grad[l * next + c * stride] = from_float<G>(scratch[c * L + l]);
      }
    }
    return;
  }
  for (int64_t from = 0; from < classes; from += L) {
    const int64_t c = from < last ? from : last;
    V<T> g[L] = {};
    each_class<T, kFew>(classes, [&](int j) ARL_LAMBDA { g[j] = gradient(c + j); });
    store_classes<T, G, kFew>(grad, rows, c, classes, g);
  }
}

}  // namespace arl::ARL_ISA
