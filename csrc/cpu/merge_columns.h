// The output of pivoted_linear from its two parts: the intermediate, and the products of the second product.
// Included by packed_factors.h alone, for one instruction set.
//
// Both parts hold columns of y in rising order, so a panel of the second product and a stretch of the intermediate
// together are a stretch of columns of y, and every vector of these is chosen from one vector of either. Which lanes
// are chosen is found once, when the factors are packed.
#pragma once

#include "cpu/lowrank_linear.h"

namespace mixrank {
namespace {

// `count` columns of y from `column` on, of which lane i is lane select[i] of the vector at `hidden` of the
// intermediate, or lane select[i] - kLanes of the one at `sum` of the tile. S is the arithmetic of the accumulators.
template <class S>
struct alignas(kLine) MergeStep {
  int64_t column;
  int64_t count;   // kLanes, or less where a whole vector would reach beyond the columns that are there
  int64_t hidden;  // from the first element of a row of the row block
  int64_t sum;     // from the first element of a row of the tile
  typename S::Lane select[S::kLanes];
};

// Where a panel begins among the columns of y and among the steps.
struct MergePanel {
  int64_t column;
  int64_t step;
};

// The steps for columns index[0] .. index[R - 1] from the intermediate and index[R] .. index[N - 1] from panels of
// `width` columns of the second product.
template <class S>
struct MergePlan {
  const int64_t* index;  // [N]: its first R entries and its others rise, and together they are 0 .. N - 1
  int64_t R, N, width;

  static int64_t most_steps(int64_t R, int64_t N, int64_t panels) {
    return N / S::kLanes + panels + ceil_div(R, kInner);
  }

  // Writes panels [count + 1] and their steps.
  void write(int64_t count, MergePanel* panels, MergeStep<S>* steps) const {
    int64_t step = 0, column = 0;
    for (int64_t j = 0; j < count; ++j) {
      panels[j] = {column, step};
      const int64_t end = j + 1 < count ? index[R + (j + 1) * width - 1] + 1 : N;
      int64_t second = min_of(j * width, N - R);  // columns of the second product before `at`
      for (int64_t at = column; at < end; ++step) {
        MergeStep<S> made = from(at, end, second, j * width);
        const int64_t next = at + made.count;
        if (made.count < S::kLanes && next - S::kLanes >= column) {
          // The vector that ends there: some columns are stored twice.
          int64_t earlier = second;
          for (int64_t back = at; back > next - S::kLanes; --back) earlier -= is_second(earlier - 1, back - 1);
          const MergeStep<S> whole = from(next - S::kLanes, next, earlier, j * width);
          if (whole.count == S::kLanes) made = whole;
        }
        steps[step] = made;
        for (; at < next; ++at) second += is_second(second, at);
      }
      column = end;
    }
    panels[count] = {column, step};
  }

  // Whether column `at` of y is column `second` of the second product.
  bool is_second(int64_t second, int64_t at) const {
    return second >= 0 && R + second < N && index[R + second] == at;
  }

  // At most a vector of columns from `at` on, before `end`, that lie in one piece of the row block.
  MergeStep<S> from(int64_t at, int64_t end, int64_t second, int64_t panel) const {
    const int64_t first = at - second, z = second;
    MergeStep<S> step{at, 0, first / kInner * kRowBlockSize<S> + first % kInner, z - panel, {}};
    for (int64_t hidden = first; step.count < S::kLanes && at < end; ++at, ++step.count) {
      if (is_second(second, at)) {
        step.select[step.count] = S::kLanes + second++ - z;
      } else {
        if (hidden / kInner != first / kInner) break;
        step.select[step.count] = hidden++ - first;
      }
    }
    if (first >= R) step.hidden = 0;  // nothing of the intermediate: no address past it
    return step;
  }
};

// Rows of y from a row block of the intermediate and a tile with rows `sum_row` apart, `bias` added, rounded once.
// Both are readable for a vector past their last elements.
template <class S, class T>
inline void merge_columns(const MergeStep<S>* step, const MergeStep<S>* end, int64_t rows,
                          const typename S::Acc* hidden, const typename S::Acc* sum, int64_t sum_row, const T* bias,
                          int64_t bias_stride, T* y, int64_t y_row) {
  for (; step < end; ++step) {
    const auto* first = hidden + step->hidden;
    const auto* second = sum + step->sum;
    T* out = y + step->column;
    const T* added = bias ? bias + step->column * bias_stride : nullptr;
    if (step->count == S::kLanes && (bias == nullptr || bias_stride == 1)) {
      const typename S::V with = added ? S::load(added) : S::zero();
      for (int64_t row = 0; row < rows; ++row) {
        typename S::V merged =
            S::choose(S::load(first + row * kRowStride<S>), S::load(second + row * sum_row), step->select);
        if (added) merged = S::add(merged, with);
        S::store(out + row * y_row, merged);
      }
      continue;
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < step->count; ++i) {
        const int64_t lane = step->select[i];
        const auto value =
            lane < S::kLanes ? first[row * kRowStride<S> + lane] : second[row * sum_row + lane - S::kLanes];
        narrow(added ? value + widen(added[i * bias_stride]) : value, out + row * y_row + i);
      }
    }
  }
}

}  // namespace
}  // namespace mixrank
