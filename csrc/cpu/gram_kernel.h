// The implementation of gram.h for one instruction set. S is an arithmetic, T the element type of x, G that of gram.
#pragma once

#include "cpu/gram.h"

namespace mixrank {
namespace {

// Rows between two additions to gram: enough to make these cheap, few enough for fp32 sums and for the scratch.
constexpr int64_t kMaxTokens = 2048;
constexpr int64_t kMaxPackedBytes = 16 << 20;

// Columns that are packed together: whole panels of the left operand (kRows wide) and of the right (kTileCols wide).
template <class S>
constexpr int64_t packed_group() {
  int64_t group = kTileCols<S>;
  while (group % S::kRows != 0) group += kTileCols<S>;
  return group;
}

template <class S, class T, class G>
struct Gram {
  using Acc = typename S::Acc;
  using Unit = typename S::Unit;
  static constexpr int64_t kRows = S::kRows, kCols = kTileCols<S>, kGroup = packed_group<S>();

  const GramParams& p;
  const int64_t M = p.x.rows, K = p.x.cols;
  const int64_t groups = ceil_div(K, kGroup), col_panels = ceil_div(K, kCols);
  const int64_t capacity = token_capacity();  // rows of x packed at once
  const int64_t capacity_units = ceil_div(capacity, S::kPack);

  int64_t token_capacity() const {
    const int64_t fit = kMaxPackedBytes / (2 * groups * kGroup * static_cast<int64_t>(sizeof(Unit)) / S::kPack);
    const int64_t block = kBlock * S::kPack;
    return min_of(M, max_of(block, min_of(kMaxTokens, fit / block * block)));
  }

  static void entry(const GramParams& params) {
    if (params.x.rows == 0) return;
    const Gram gram{params};
    if (params.batches == 1) {
      gram.run(0);
    } else {
      parallel(params.batches, 1, [&](int64_t begin, int64_t end) {
        for (int64_t batch = begin; batch < end; ++batch) gram.run(batch);
      });
    }
  }

  // Tiles of the upper triangle in column panel j: rows up to the last column of the panel.
  int64_t tiles_in_panel(int64_t j) const { return ceil_div(min_of((j + 1) * kCols, K), kRows); }

  void run(int64_t batch) const {
    const int64_t panel_size = capacity_units * groups * kGroup;
    auto* left = static_cast<Unit*>(scratch(Scratch::kCall, 2 * panel_size * sizeof(Unit)));
    Unit* right = left + panel_size;
    int64_t tiles = 0;
    for (int64_t j = 0; j < col_panels; ++j) tiles += tiles_in_panel(j);
    for (int64_t token = 0; token < M; token += capacity) {
      const int64_t count = min_of(capacity, M - token);
      const bool large = count * K * K > (1 << 20);
      parallel(groups, large ? 1 : groups, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
          pack(batch, group, token, count, left + group * kGroup * capacity_units,
               right + group * kGroup * capacity_units);
        }
      });
      parallel(tiles, large ? 1 : tiles, [&](int64_t begin, int64_t end) {
        multiply(begin, end, ceil_div(count, S::kPack), left, right, static_cast<G*>(p.gram) + batch * K * K);
      });
    }
  }

  // Columns [group * kGroup, + kGroup) of rows [token, token + count): right[panel][unit][kCols] of x and
  // left[panel][unit][kRows] of w * x; the column sums ride along.
  void pack(int64_t batch, int64_t group, int64_t token, int64_t count, Unit* left, Unit* right) const {
    const int64_t first = group * kGroup, cols = min_of(kGroup, K - first);
    const Acc* weight = static_cast<const Acc*>(p.row_weight);
    if (weight) weight += batch * M + token;
    double sums[kGroup] = {};
    Acc values[kGroup];
    Unit units[kGroup] = {};
    const auto source = [&](int64_t m) {
      return row_of<T>(p.x, token + m) + batch * p.x_batch_stride + first * p.x.col_stride;
    };
    for (int64_t u = 0; u * S::kPack < count; ++u) {
      if constexpr (S::kPack == 1) {
        widen_row<S>(source(u), p.x.col_stride, cols, units);
      } else {
        const bool full = u * 2 + 1 < count;
        interleave(source(u * 2), full ? source(u * 2 + 1) : nullptr, p.x.col_stride, cols, units);
      }
      for (int64_t c = 0; c < kGroup; c += kCols) {
        memcpy(right + c * capacity_units + u * kCols, units + c, kCols * sizeof(Unit));
      }
      if (p.column_sum) {
        for (int64_t e = 0; e < S::kPack && u * S::kPack + e < count; ++e) {
          const int64_t m = u * S::kPack + e;
          const double factor = weight ? static_cast<double>(weight[m]) : 1.0;
          widen_row<typename S::Wide>(source(m), p.x.col_stride, cols, values);
          for (int64_t c = 0; c < cols; ++c) sums[c] += factor * static_cast<double>(values[c]);
        }
      }
      const Unit* scaled = units;
      if constexpr (S::kPack == 1) {
        if (weight) {
          for (int64_t c = 0; c < kGroup; ++c) values[c] = weight[u] * units[c];
          scaled = values;
        }
      }
      for (int64_t c = 0; c < kGroup; c += kRows) {
        memcpy(left + c * capacity_units + u * kRows, scaled + c, kRows * sizeof(Unit));
      }
    }
    if (p.column_sum) {
      G* out = static_cast<G*>(p.column_sum) + batch * K + first;
      for (int64_t c = 0; c < cols; ++c) out[c] = static_cast<G>(out[c] + sums[c]);
    }
  }

  // One unit per column from two rows of x; a missing second row counts as zero.
  static void interleave(const T* low, const T* high, int64_t stride, int64_t cols, Unit* units) {
    if (high) {
      for (int64_t c = 0; c < cols; ++c) {
        units[c] = low[c * stride].bits | static_cast<Unit>(high[c * stride].bits) << 16;
      }
    } else {
      for (int64_t c = 0; c < cols; ++c) units[c] = low[c * stride].bits;
    }
  }

  // Tiles [begin, end) of the triangle, counted panel by panel.
  void multiply(int64_t begin, int64_t end, int64_t units, const Unit* left, const Unit* right, G* gram) const {
    auto* strip = static_cast<Acc*>(scratch(Scratch::kWorker, ceil_div(K, kRows) * kRows * kCols * sizeof(Acc)));
    int64_t panel_begin = 0;
    for (int64_t j = 0; panel_begin < end; ++j) {
      const int64_t in_panel = tiles_in_panel(j);
      const int64_t first = max_of(begin - panel_begin, 0), last = min_of(end - panel_begin, in_panel);
      panel_begin += in_panel;
      if (first >= last) continue;
      for (int64_t u = 0; u < units; u += kBlock) {
        const int64_t steps = min_of(kBlock, units - u);
        const Unit* b = right + (j * capacity_units + u) * kCols;
        for (int64_t i = first; i < last; ++i) {
          const Unit* a = left + (i * capacity_units + u) * kRows;
          Acc* sum = strip + (i - first) * kRows * kCols;
          if (K - j * kCols <= S::kLanes) {
            tile<S, kRows, 1, 1, kRows, kCols, Unit>(steps, a, b, sum, kCols, u > 0);
          } else {
            tile<S, kRows, 2, 1, kRows, kCols, Unit>(steps, a, b, sum, kCols, u > 0);
          }
        }
      }
      flush(j, first, last, strip, gram);
    }
  }

  // Adds the sums of rows [first * kRows, last * kRows) in column panel j to both halves of gram.
  void flush(int64_t j, int64_t first, int64_t last, const Acc* strip, G* gram) const {
    const int64_t begin = first * kRows, end = min_of(last * kRows, K), col = j * kCols;
    const int64_t col_end = min_of(col + kCols, K);
    for (int64_t i = begin; i < end; ++i) {
      const Acc* sum = strip + (i - begin) * kCols;
      for (int64_t c = max_of(col, i); c < col_end; ++c) add_to(gram + i * K + c, sum[c - col]);
    }
    for (int64_t c = col; c < col_end; ++c) {
      const Acc* sum = strip + (c - col);
      for (int64_t i = begin; i < min_of(end, c); ++i) add_to(gram + c * K + i, sum[(i - begin) * kCols]);
    }
  }

  static void add_to(G* total, Acc value) { *total = static_cast<G>(*total + value); }
};

template <class S, class T>
void gram_into(const GramParams& params) {
  if (params.gram_dtype == Dtype::kFloat64) {
    Gram<S, T, double>::entry(params);
  } else {
    Gram<S, T, float>::entry(params);
  }
}

template <class BfloatPairs>
void gram_kernel(const GramParams& params) {
  switch (params.dtype) {
    case Dtype::kFloat32:
      return gram_into<F32, float>(params);
    case Dtype::kFloat64:
      return gram_into<F64, double>(params);
    case Dtype::kBFloat16:
      // A weighted row is no longer a row of bf16 numbers.
      return params.row_weight ? gram_into<F32, BFloat>(params) : gram_into<BfloatPairs, BFloat>(params);
    case Dtype::kFloat16:
      return gram_into<F32, Half>(params);
  }
}

}  // namespace
}  // namespace mixrank
