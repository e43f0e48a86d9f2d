// The row kernel: statistics and gradient of a chunk of rows, each read from memory once.
//
// Every row goes through the same passes: the largest logit; the exponentials, kept in scratch, and their
// sums; the gradient. What differs is which rows and classes share a vector. All forms leave what the
// statistics need per row in a Chunk, whose rows are then finished as vectors. No single element is written
// where a vector is read soon after: that read would have to wait for the write to reach the cache.
#pragma once

#include <type_traits>

#include "group_rows.h"
#include "lane_rows.h"
#include "wide_row.h"

namespace arl::ARL_ISA {

// Up to so many vectors of classes each row gets a lane, then rows are taken in groups; with a gradient
// longer ones cost less one by one (measured).
constexpr int kLaneVectors = ARL_VECTOR_BYTES == 64 ? 3 : 2, kGroupVectors = ARL_VECTOR_BYTES == 64 ? 8 : 16;
static_assert(kGroupVectors * Vector<float>::lanes <= cpu::kNarrowClasses);

template <class T, class S, class G, bool Keep>
ARL_INLINE void chunk_rows(const Loss& loss, int branch, int64_t begin, int count, T* scratch,
                           Chunk<T>& chunk) {
  constexpr int L = Vector<T>::lanes;
  const int64_t classes = loss.classes;
  const bool indices = loss.soft_target == nullptr;
  const auto by_lane = [&](auto layout) ARL_LAMBDA {
    for (int i = 0; i < count; i += L) {
      const int rows = count - i < L ? count - i : L;
      lane_rows<T, S, G, decltype(layout)::value, Keep>(loss, branch, begin + i, rows, scratch, chunk, i);
    }
  };
  if (loss.positions > 0) return by_lane(std::integral_constant<Layout, Layout::kColumns>());
  if (indices && classes < L) return by_lane(std::integral_constant<Layout, Layout::kFew>());
  if (indices && classes <= kLaneVectors * L) return by_lane(std::integral_constant<Layout, Layout::kRows>());
  const auto top_of = [&](int i) ARL_LAMBDA {
    const int64_t row = begin + (i < count ? i : 0);
    return row_top<T>(static_cast<const S*>(loss.logits[branch]) + row * loss.row_stride[branch], classes);
  };
  if (indices && (!Keep || classes <= kGroupVectors * L)) {
    T tops[kAhead];
    for (int i = 0; i < kAhead; ++i) tops[i] = top_of(i);
    for (int i = 0; i < count; i += L) {
      const int rows = count - i < L ? count - i : L;
      group_rows<T, S, G, Keep>(loss, branch, begin + i, rows, count - i, tops, scratch, chunk, i);
    }
    return;
  }

  T top = top_of(0);
  T* target_row = scratch + (classes + 15) / 16 * 16;
  const bool general = !indices || loss.label_smoothing != 0;
  if (general && indices) {
    const T smooth = T(loss.label_smoothing / double(classes));
    for (int64_t c = 0; c < classes; ++c) target_row[c] = smooth * weight_of<T>(loss, c);
  }
  for (int i = 0; i < count; ++i) {
    const bool more = i + 1 < count;
    if (!Keep || general) {
      wide_row<T, S, G, true, Keep>(loss, branch, begin + i, more, &top, scratch, target_row, chunk, i);
    } else {
      wide_row<T, S, G, false, true>(loss, branch, begin + i, more, &top, scratch, nullptr, chunk, i);
    }
  }
}

template <class T, class S, class G>
static void rows(const Loss& loss, int branch, int64_t begin, int64_t end, void* scratch_memory,
                 ChunkSums* sums) {
  T* scratch = static_cast<T*>(scratch_memory);
  Chunk<T> chunk;
  const int count = int(end - begin);
  if (loss.grad[branch] != nullptr) {
    chunk_rows<T, S, G, true>(loss, branch, begin, count, scratch, chunk);
  } else {
    chunk_rows<T, S, G, false>(loss, branch, begin, count, scratch, chunk);
  }
  if (loss.streams) finish_streams();
  finish_rows<T>(loss, branch, begin, count, chunk, sums);
}

}  // namespace arl::ARL_ISA
