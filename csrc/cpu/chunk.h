// What the row kernels leave of each row of a chunk, from which its statistics are finished as vectors; and
// what they share: weights of classes, the largest element of a row.
#pragma once

#include "loss.h"
#include "vec.h"

// A form of the row kernel. With 32 registers it is a function of its own, in which all constants of an
// exponential stay in registers; with 16 they do not anyway.
#if ARL_VECTOR_BYTES == 64
#define ARL_ROWS static __attribute__((noinline))
#else
#define ARL_ROWS ARL_INLINE
#endif

namespace arl::ARL_ISA {

using cpu::ChunkSums;
using cpu::kChunkRows;
using cpu::Loss;

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

// Rows first, first + 1, ..., one per lane.
template <class T>
ARL_INLINE void keep_rows(Chunk<T>& chunk, int first, Bits<T> valid, V<T> a, V<T> b, V<T> partition,
                          V<T> energy, V<T> confidence, V<T> l1, Bits<T> correct) {
  const V<T> zero{}, one = splat<T>(T(1));
  store<T>(chunk.a + first, valid ? a : zero);
  store<T>(chunk.b + first, valid ? b : zero);
  store<T>(chunk.partition + first, valid ? partition : one);
  store<T>(chunk.energy + first, valid ? energy : zero);
  store<T>(chunk.confidence + first, valid ? confidence : zero);
  store<T>(chunk.l1 + first, valid ? l1 : zero);
  store<T>(chunk.correct + first, valid & correct ? one : zero);
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
template <class T>
ARL_INLINE V<T> weights_of(const Loss& loss, int64_t c) {  // of L classes from c on
  return loss.weight == nullptr ? splat<T>(T(1)) : load<T>(static_cast<const T*>(loss.weight) + c);
}

// L rows of a branch, `to_next` elements apart. What follows the last one has its logits, and does not count.
template <class T, class S>
struct LaneRows {
  static constexpr int L = Vector<T>::lanes;
  const S* x[L];
  Bits<T> y, valid;      // class indices, 0 where a row does not count
  alignas(64) T x_y[L];  // logits of the classes y, whose stride is given

  ARL_LAMBDA LaneRows(const Loss& loss, int branch, int64_t begin, int rows, const S* first, int64_t to_next,
                      int64_t stride) {
    const int32_t* target = loss.target + begin;
    for (int l = 0; l < L; ++l) {
      x[l] = first + (l < rows ? l : rows - 1) * to_next;
      x_y[l] = to_float(x[l][(target[l] < 0 || l >= rows ? 0 : target[l]) * stride]);
    }
    typedef int32_t Indices __attribute__((vector_size(4 * L)));
    Indices indices;
    __builtin_memcpy(&indices, target, sizeof(indices));
    y = __builtin_convertvector(indices, Bits<T>);
    valid = (y >= 0) & (class_numbers<T>(0) < Lane<T>(rows));
    if (branch > 0 && loss.mask != nullptr) {
      for (int l = 0; l < rows; ++l) valid[l] &= loss.present(branch, begin + l) ? -1 : 0;
    }
    y &= valid;
  }

  // What the targets give the classes y: the rest of label smoothing, times the weights.
  ARL_LAMBDA V<T> weighted(const Loss& loss) const {
    V<T> t = splat<T>(T(1 - loss.label_smoothing));
    for (int l = 0; l < L && loss.weight != nullptr; ++l) t[l] *= weight_of<T>(loss, y[l]);
    return t;
  }
};

// Whether the first largest logit of a row has the index `y`; a NaN, which `top` may have missed, counts as
// the largest. Where y's is the largest and the others' exponentials sum to less than 1, none is as large.
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

// The largest logit of a row; NaNs may be missed.
template <class T, class S>
ARL_INLINE T row_top(const S* x, int64_t classes) {
  constexpr int L = Vector<T>::lanes;
  constexpr T lowest = -T(__builtin_inf());
  V<T> top0 = load_last<T>(x, classes, lowest), top1 = top0, top2 = top0, top3 = top0;
  int64_t c = 0;
  for (; c + 4 * L <= classes; c += 4 * L) {
    top0 = larger<T>(load<T>(x + c), top0);
    top1 = larger<T>(load<T>(x + c + L), top1);
    top2 = larger<T>(load<T>(x + c + 2 * L), top2);
    top3 = larger<T>(load<T>(x + c + 3 * L), top3);
  }
  for (; c + L <= classes; c += L) top0 = larger<T>(load<T>(x + c), top0);
  return largest<T>(larger<T>(larger<T>(top0, top1), larger<T>(top2, top3)));
}

// sum_c |x_c| of a row.
template <class T, class S>
ARL_INLINE T row_l1(const S* x, int64_t classes) {
  constexpr int L = Vector<T>::lanes;
  V<T> sum0{}, sum1{};
  int64_t c = 0;
  for (; c + 2 * L <= classes; c += 2 * L) {
    sum0 += absolute<T>(load<T>(x + c));
    sum1 += absolute<T>(load<T>(x + c + L));
  }
  for (; c + L <= classes; c += L) sum0 += absolute<T>(load<T>(x + c));
  if (c < classes) {
    const V<T> v = absolute<T>(load_last<T>(x, classes, T(0)));
    sum1 += last_numbers<T>(classes) < Lane<T>(c) ? V<T>{} : v;
  }
  return sum<T>(sum0 + sum1);
}

// The index of the first largest element of a row; a NaN counts as the largest.
template <class T>
ARL_INLINE int64_t first_largest(const T* x, int64_t classes) {
  constexpr int L = Vector<T>::lanes;
  const T top = row_top<T>(x, classes), magnitudes = row_l1<T>(x, classes);
  int64_t c = 0;
  if (magnitudes != magnitudes) {
    while (x[c] == x[c]) ++c;
    return c;
  }
  while (c + L <= classes && !any<T>(load<T>(x + c) == top)) c += L;
  while (x[c] != top) ++c;
  return c;
}

}  // namespace arl::ARL_ISA
