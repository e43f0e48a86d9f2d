// The row kernel: statistics and gradient of a chunk of rows, each read from memory once.
//
// Few classes: one row per vector lane. Many: one row at a time, in passes (the largest logit; the
// exponentials, kept in scratch, and their sums; the gradient). Both leave what the statistics need per row
// in a Chunk, whose rows are then finished as vectors. No single element is written where a vector is read
// soon after: that read would have to wait for the write to reach the cache.
#pragma once

#include <type_traits>

#include "loss.h"
#include "vec.h"

namespace arl::ARL_ISA {

using cpu::ChunkSums;
using cpu::kChunkRows;
using cpu::kNarrowClasses;
using cpu::kSingleClasses;
using cpu::Loss;

// Up to so many vectors of classes each row gets a lane; longer rows cost less one by one (measured).
constexpr int kLaneVectors = ARL_VECTOR_BYTES == 16 ? 4 : 7;
static_assert(kLaneVectors * Vector<float>::lanes <= kNarrowClasses);

// Per row: the row loss is A log Z - B with A = sum_c t_c and B = sum_c t_c (x_c - top), where t is the
// target distribution after smoothing and class weights. A row that is not valid has A = B = E = 0 and Z = 1.
template <class T>
struct alignas(64) Chunk {
  T a[kChunkRows], b[kChunkRows];
  T partition[kChunkRows];  // Z = sum_c exp(x_c - top)
  T energy[kChunkRows];     // E = sum_c exp(x_c - top) (x_c - top)
  T confidence[kChunkRows], l1[kChunkRows], correct[kChunkRows];
};

template <class T>
ARL_INLINE void skip_row(Chunk<T>& chunk, int i) {
  chunk.a[i] = chunk.b[i] = chunk.energy[i] = chunk.confidence[i] = chunk.l1[i] = chunk.correct[i] = T(0);
  chunk.partition[i] = T(1);
}

// Cross-entropy A log Z - B and entropy H = log Z - E / Z of all rows of the chunk, and their sums.
template <class T>
ARL_INLINE void finish_rows(const Loss& loss, int branch, int64_t begin, int rows, Chunk<T>& chunk,
                            ChunkSums* sums) {
  constexpr int L = Vector<T>::lanes;
  for (int i = rows; i % L != 0; ++i) skip_row(chunk, i);
  const T* dependences = loss.logit_l1 ? chunk.l1 : chunk.confidence;
  V<T> loss_sum{}, correct{}, entropy_sum{}, dependence{};
  for (int i = 0; i < rows; i += L) {
    const V<T> partition = load<T>(chunk.partition + i);
    const V<T> log_z = log_positive<T>(partition);
    const V<T> row_loss = load<T>(chunk.a + i) * log_z - load<T>(chunk.b + i);
    const V<T> entropy = log_z - load<T>(chunk.energy + i) / partition;
    loss_sum += row_loss;
    entropy_sum += entropy < T(0) ? V<T>{} : entropy;  // rounding only; a NaN stays
    dependence += load<T>(dependences + i);
    correct += load<T>(chunk.correct + i);
    store<T>(chunk.a + i, row_loss);
  }
  if (loss.row_loss != nullptr) {
    T* out = static_cast<T*>(loss.row_loss) + branch * loss.rows + begin;
    for (int i = 0; i < rows; ++i) out[i] = chunk.a[i];
  }
  sums->of[kLoss] = double(sum<T>(loss_sum));
  sums->of[kCorrect] = double(sum<T>(correct));
  sums->of[kEntropy] = double(sum<T>(entropy_sum));
  sums->of[kDependence] = double(sum<T>(dependence));
}

template <class T>
ARL_INLINE T weight_of(const Loss& loss, int64_t c) {
  return loss.weight == nullptr ? T(1) : static_cast<const T*>(loss.weight)[c];
}

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

// Class indices and few classes, or columns: lane l of every vector belongs to row begin + l.
template <class T, class S, class G, Layout layout>
ARL_INLINE void lane_rows(const Loss& loss, int branch, int64_t begin, int rows, T* scratch, Chunk<T>& chunk,
                          int first) {
  constexpr int L = Vector<T>::lanes;
  constexpr bool kFew = layout == Layout::kFew, kColumns = layout == Layout::kColumns;
  const int64_t classes = loss.classes;
  const int64_t last = classes > L ? classes - L : 0;    // where the last L classes begin
  const int64_t stride = kColumns ? loss.positions : 1;  // of classes
  const S* logits = static_cast<const S*>(loss.logits[branch]);
  logits +=
      kColumns ? begin / stride * loss.row_stride[branch] + begin % stride : begin * loss.row_stride[branch];
  const S* x[L];
  alignas(64) Lane<T> ys[L], valids[L];
  for (int l = 0; l < L; ++l) {  // lanes past the last row repeat it, and are dropped
    const int own = l < rows ? l : rows - 1;
    const int64_t row = begin + own;
    x[l] = logits + own * (kColumns ? 1 : loss.row_stride[branch]);
    const bool used = l < rows && loss.valid(branch, row);
    valids[l] = used ? -1 : 0;
    ys[l] = Lane<T>(used ? loss.class_index(row) : 0);
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
      prefetch<L>(x[0] + c * stride + L);
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
  // The true class is left out of the sum at first: p_y - 1 = -others / Z keeps its digits as p_y goes to 1.
  const Bits<T> y = bit_cast<Bits<T>>(ys), valid = bit_cast<Bits<T>>(valids);
  const bool keep = loss.grad[branch] != nullptr;
  V<T> others{}, energy{}, d_y{};
  Bits<T> number{};
  for (int64_t c = 0; c < classes; ++c) {
    V<T> d = load<T>(scratch + c * L) - top;
    const Bits<T> is_y = y == number;
    d_y = is_y ? d : d_y;
    const V<T> e = is_y ? V<T>{} : exp_nonpositive<T>(d);
    others += e;
    energy += e * d;
    if (keep) store<T>(scratch + c * L, e);
    number += 1;
  }
  V<T> bounded = d_y;
  const V<T> e_y = exp_nonpositive<T>(bounded);
  const V<T> partition = others + e_y;
  energy += e_y * bounded;
  const V<T> p_y = e_y / partition;
  if (any<T>(partition != partition)) {  // a NaN counts as the largest, as in torch.argmax
    for (int l = 0; l < rows; ++l) {
      if (partition[l] == partition[l]) continue;
      int64_t c = 0;
      while (c < classes && to_float(x[l][c * stride]) == to_float(x[l][c * stride])) ++c;
      if (c < classes) where[l] = Lane<T>(c);
    }
  }

  V<T> weighted = splat<T>(T(1 - loss.label_smoothing));
  if (loss.weight != nullptr) {
    for (int l = 0; l < L; ++l) weighted[l] *= weight_of<T>(loss, ys[l]);
  }
  const V<T> zero{}, one = splat<T>(T(1));
  const V<T> a = weighted + smooth * T(loss.weight_total);
  store<T>(chunk.a + first, valid ? a : zero);
  store<T>(chunk.b + first, valid ? weighted * d_y + smooth_b : zero);
  store<T>(chunk.partition + first, valid ? partition : one);
  store<T>(chunk.energy + first, valid ? energy : zero);
  store<T>(chunk.confidence + first, valid ? p_y : zero);
  store<T>(chunk.l1 + first, valid ? l1 : zero);
  store<T>(chunk.correct + first, valid & (where == y) ? one : zero);

  // d(row loss)/dx_c = A p_c - t_c
  if (!keep) return;
  const T scale = T(loss.grad_scale[branch]);
  const V<T> factor = a * scale / partition;
  const V<T> g_y = ((a - weighted) * p_y - weighted * (others / partition)) * scale;
  G* grad = static_cast<G*>(loss.grad[branch]);
  grad += kColumns ? begin / stride * stride * classes + begin % stride : begin * classes;
  const auto gradient = [&](int64_t c) ARL_LAMBDA {
    V<T> g = y == Lane<T>(c) ? g_y : load<T>(scratch + c * L) * factor;
    if (loss.label_smoothing != 0) g -= smooth * weight_of<T>(loss, c) * scale;
    return valid ? g : zero;
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

// Whether the first largest logit of a row has the index `y`; a NaN, which `top` may have missed, counts as
// the largest.
template <class T, class S>
ARL_INLINE bool first_largest_is(const S* x, int64_t classes, int64_t y, T top, bool maybe_nan) {
  if (maybe_nan) {
    int64_t c = 0;
    while (c < classes && to_float(x[c]) == to_float(x[c])) ++c;
    if (c < classes) return c == y;
  }
  if (to_float(x[y]) != top) return false;
  constexpr int L = Vector<T>::lanes;
  Bits<T> equal{};  // an earlier one
  int64_t c = 0;
  for (; c + L <= y; c += L) equal |= load<T>(x + c) == top;
  if (c < y) {
    const bool inside = c + L <= classes;
    const V<T> v = inside ? load<T>(x + c) : load_last<T>(x, classes, T(0));
    const Bits<T> number = inside ? class_numbers<T>(c) : last_numbers<T>(classes);
    equal |= (v == top) & (number < Lane<T>(y));
  }
  return !any<T>(equal);
}

// The largest logit of a row (NaNs may be missed), and sum_c |x_c| if L1.
template <class T, class S, bool L1>
ARL_INLINE T row_top(const S* x, int64_t classes, T* l1) {
  constexpr int L = Vector<T>::lanes;
  constexpr T lowest = -T(__builtin_inf());
  V<T> top0 = splat<T>(lowest), top1 = top0, top2 = top0, top3 = top0, l1_sum{};
  int64_t c = 0;
  for (; c + 4 * L <= classes; c += 4 * L) {
    const V<T> v0 = load<T>(x + c), v1 = load<T>(x + c + L), v2 = load<T>(x + c + 2 * L),
               v3 = load<T>(x + c + 3 * L);
    top0 = larger<T>(v0, top0);
    top1 = larger<T>(v1, top1);
    top2 = larger<T>(v2, top2);
    top3 = larger<T>(v3, top3);
    if (L1) l1_sum += absolute<T>(v0) + absolute<T>(v1) + (absolute<T>(v2) + absolute<T>(v3));
  }
  for (; c + L <= classes; c += L) {
    const V<T> v = load<T>(x + c);
    top0 = larger<T>(v, top0);
    if (L1) l1_sum += absolute<T>(v);
  }
  if (c < classes) {
    top1 = larger<T>(load_last<T>(x, classes, lowest), top1);
    if (L1)
      l1_sum += last_numbers<T>(classes) < Lane<T>(c) ? V<T>{} : absolute<T>(load_last<T>(x, classes, T(0)));
  }
  if (L1) *l1 = sum<T>(l1_sum);
  return largest<T>(larger<T>(larger<T>(top0, top1), larger<T>(top2, top3)));
}

// The index of the first largest element of a row; a NaN counts as the largest.
template <class T>
ARL_INLINE int64_t first_largest(const T* x, int64_t classes) {
  constexpr int L = Vector<T>::lanes;
  T magnitudes, top = row_top<T, T, true>(x, classes, &magnitudes);
  int64_t c = 0;
  if (magnitudes != magnitudes) {
    while (x[c] == x[c]) ++c;
    return c;
  }
  while (c + L <= classes && !any<T>(load<T>(x + c) == top)) c += L;
  while (x[c] != top) ++c;
  return c;
}

// One row at a time. `General`: soft targets or label smoothing, whose target distribution is kept in scratch
// as well.
template <class T, class S, class G, bool General>
ARL_INLINE void wide_row(const Loss& loss, int branch, int64_t row, T* scratch, T* target_row,
                         Chunk<T>& chunk, int i) {
  constexpr int L = Vector<T>::lanes;
  const int64_t classes = loss.classes;
  const int64_t rest = classes % L;
  const S* x = static_cast<const S*>(loss.logits[branch]) + row * loss.row_stride[branch];
  const S* next = row + 1 < loss.rows ? x + loss.row_stride[branch] : x;
  G* grad = static_cast<G*>(loss.grad[branch]);
  if (grad != nullptr) grad += row * classes;
  const bool streams = loss.streams && grad != nullptr && can_stream<T>(grad);
  const G* next_grad = grad != nullptr && row + 1 < loss.rows ? grad + classes : grad;
  if (!loss.valid(branch, row)) {
    skip_row(chunk, i);
    if (grad != nullptr) {
      for (int64_t c = 0; c < classes; ++c) grad[c] = G{};
    }
    return;
  }

  T l1 = 0;
  const T top = loss.logit_l1 ? row_top<T, S, true>(x, classes, &l1) : row_top<T, S, false>(x, classes, &l1);
  const T* soft =
      loss.soft_target == nullptr ? nullptr : static_cast<const T*>(loss.soft_target) + row * classes;
  const int64_t y = soft == nullptr ? loss.class_index(row) : first_largest(soft, classes);

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

  // The exponentials, kept in scratch; meanwhile the next row is fetched, and where its gradient goes. The
  // class index is left out of the sum at first: p_y - 1 = -others / Z keeps its digits as p_y goes to 1.
  V<T> d_y = splat<T>(to_float(x[y]) - top);
  const T e_y = exp_nonpositive<T>(d_y)[0];
  V<T> z0{}, z1{}, e0{}, e1{};
  const auto exponentials = [scratch](V<T> d, Bits<T> left_out, int64_t at, V<T>& z, V<T>& e) ARL_LAMBDA {
    const V<T> p = left_out ? V<T>{} : exp_nonpositive<T>(d);
    z += p;
    e += p * d;
    store<T>(scratch + at, p);
  };
  Bits<T> number = class_numbers<T>(0);
  int64_t c = 0;
  for (; c + 2 * L <= classes; c += 2 * L) {
    prefetch<2 * L>(next + c);
    if (grad != nullptr && !streams) prefetch<2 * L>(next_grad + c);
    exponentials(load<T>(x + c) - top, number == Lane<T>(y), c, z0, e0);
    exponentials(load<T>(x + c + L) - top, number == Lane<T>(y - L), c + L, z1, e1);
    number += 2 * L;
  }
  if (c + L <= classes) {
    exponentials(load<T>(x + c) - top, number == Lane<T>(y), c, z0, e0);
    c += L;
  }
  if (rest > 0) {
    number = last_numbers<T>(classes);
    const V<T> v = load_last<T>(x, classes, -T(__builtin_inf()));
    exponentials(v - top, (number < Lane<T>(c)) | (number == Lane<T>(y)), c, z1, e1);
  }
  const T others = sum<T>(z0 + z1);
  const T partition = others + e_y;
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
  chunk.l1[i] = l1;
  chunk.correct[i] = first_largest_is<T, S>(x, classes, y, top, partition != partition);

  // d(row loss)/dx_c = A p_c - t_c
  if (grad == nullptr) return;
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

template <class T, class S, class G>
static void rows(const Loss& loss, int branch, int64_t begin, int64_t end, void* scratch_memory,
                 ChunkSums* sums) {
  constexpr int L = Vector<T>::lanes;
  T* scratch = static_cast<T*>(scratch_memory);
  Chunk<T> chunk;
  const int count = int(end - begin);
  const int64_t classes = loss.classes;
  const auto by_lane = [&](auto layout) ARL_LAMBDA {
    for (int i = 0; i < count; i += L) {
      const int rows = count - i < L ? count - i : L;
      lane_rows<T, S, G, decltype(layout)::value>(loss, branch, begin + i, rows, scratch, chunk, i);
    }
  };
  if (loss.positions > 0) {
    by_lane(std::integral_constant<Layout, Layout::kColumns>());
  } else if (loss.soft_target == nullptr && classes < L) {
    by_lane(std::integral_constant<Layout, Layout::kFew>());
  } else if (loss.soft_target == nullptr && classes <= kLaneVectors * L) {
    by_lane(std::integral_constant<Layout, Layout::kRows>());
  } else if (loss.soft_target == nullptr && loss.label_smoothing == 0) {
    for (int i = 0; i < count; ++i)
      wide_row<T, S, G, false>(loss, branch, begin + i, scratch, nullptr, chunk, i);
  } else {
    T* target_row = scratch + (classes + 15) / 16 * 16;
    if (loss.soft_target == nullptr) {
      const T smooth = T(loss.label_smoothing / double(classes));
      for (int64_t c = 0; c < classes; ++c) target_row[c] = smooth * weight_of<T>(loss, c);
    }
    for (int i = 0; i < count; ++i)
      wide_row<T, S, G, true>(loss, branch, begin + i, scratch, target_row, chunk, i);
  }
  if (loss.streams) finish_streams();
  finish_rows<T>(loss, branch, begin, count, chunk, sums);
}

}  // namespace arl::ARL_ISA
