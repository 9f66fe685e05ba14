// The implementation of gram.h for one instruction set. S is an arithmetic, T the element type of x, G that of gram.
//
// x is packed into panels of kCols columns, all tokens of a column panel together: the right operand of the tiles. The
// same panels are the left operand, read one column at a time, so x is packed once. A block is the product of two
// panels, kCols x kCols; the blocks of the upper triangle are numbered column by column and divided among the threads.
#pragma once

#include "cpu/gram.h"

namespace mixrank {
namespace {

// Tokens between two additions to gram: enough to make these cheap, few enough for fp32 sums.
constexpr int64_t kMaxTokens = 4096;
// What the packed panels may take of an L2 cache.
constexpr int64_t kPackedBytes = 640 << 10;
// Units of two panels that stay in L1 while all tiles of a block use them.
constexpr int64_t kGramUnits = 128;
// Units that are packed at once where even kGramUnits would not fit: the panels then come from L3, and so do the sums
// of the blocks, once for each pass over the tokens. Fewer passes cost less than larger panels do.
constexpr int64_t kWideUnits = 3 * kGramUnits;
// Multiply-adds below which threads cost more than they give.
constexpr int64_t kGramWork = 1 << 20;

// Has cache lines of its own, away from what a thread writes to its stack.
template <class S, class T, class G>
struct alignas(kLine) Gram {
  using Acc = typename S::Acc;
  using Unit = typename S::Unit;
  using Columns = FixedRows<Unit, 1, kTileCols<S>>;  // of a panel, as rows of the left operand
  static constexpr int64_t kCols = kTileCols<S>;
  static constexpr int kRows = S::kGramRows;
  static_assert(kCols % kRows == 0, "the tiles of a block divide it evenly");

  const GramParams& p;
  const bool cross = p.cross;
  const int64_t M = p.x.rows, K = p.x.cols, N = cross ? p.z.cols : K;
  const int64_t row_panels = ceil_div(K, kCols), col_panels = ceil_div(N, kCols);
  const int64_t left_panels = cross || p.row_weight ? row_panels : 0;  // else the right panels serve on both sides
  const int64_t blocks = cross ? row_panels * col_panels : col_panels * (col_panels + 1) / 2;
  const int64_t capacity = token_capacity();  // tokens packed at once
  const int64_t panel_size = ceil_div(capacity, S::kPack) * kCols;

  int64_t token_capacity() const {
    const int64_t unit_bytes = (left_panels + col_panels) * kCols * static_cast<int64_t>(sizeof(Unit));
    const int64_t fitting = kPackedBytes / unit_bytes / kGramUnits * kGramUnits;
    const int64_t units = fitting > 0 ? fitting : kWideUnits;
    return min_of(M, min_of(kMaxTokens, units * S::kPack));
  }

  static void entry(const GramParams& params) {
    if (params.x.rows == 0) return;
    const Gram gram{params};
    // Many batches are divided among the threads; of few, each is computed by all threads.
    const int64_t work = gram.M * gram.K * gram.N, batches = params.batches;
    const bool together = batches < num_threads() || batches == 1;
    parallel(batches, together ? batches : max_of(1, min_of(batches, kGramWork / work)),
             [&](int64_t begin, int64_t end) {
               for (int64_t batch = begin; batch < end; ++batch) gram.run(batch);
             });
  }

  void run(int64_t batch) const {
    const bool once = M <= capacity;  // the blocks need no place to wait for more tokens
    Arena arena;
    const int64_t right_at = arena.reserve<Unit>((left_panels + col_panels) * panel_size);
    const int64_t sums_at = arena.reserve<Acc>(once ? 0 : blocks * kCols * kCols);
    void* base = scratch(Scratch::kCall, arena.bytes);
    auto* right = at_offset<Unit>(base, right_at);
    Unit* left = left_panels ? right + col_panels * panel_size : right;
    Acc* sums = once ? nullptr : at_offset<Acc>(base, sums_at);
    G* gram = static_cast<G*>(p.gram) + batch * K * N;
    for (int64_t start = 0; start < M; start += kMaxTokens) {
      const int64_t stop = min_of(start + kMaxTokens, M);
      for (int64_t token = start; token < stop; token += capacity) {
        const int64_t count = min_of(capacity, stop - token);
        const bool large = count * K * N > kGramWork;
        parallel(col_panels, large ? 1 : col_panels, [&](int64_t begin, int64_t end) {
          pack(cross ? p.z : p.x, batch, begin, end, token, count, nullptr, right);
        });
        parallel(left_panels, large ? 1 : left_panels,
                 [&](int64_t begin, int64_t end) { pack(p.x, batch, begin, end, token, count, weights(batch), left); });
        if (p.column_sum) {
          for (int64_t i = 0; i < row_panels; ++i) add_column_sums(batch, i, count, left + i * panel_size);
        }
        parallel(blocks, large ? 1 : blocks, [&](int64_t begin, int64_t end) {
          multiply(begin, end, ceil_div(count, S::kPack), left, right, sums, token > start, token + count == stop,
                   gram);
        });
      }
    }
  }

  const Acc* weights(int64_t batch) const {
    return p.row_weight ? static_cast<const Acc*>(p.row_weight) + batch * M : nullptr;
  }

  // Panels [begin, end) of tokens [token, token + count) of x or z: packed[panel][unit][kCols], times the weights.
  // Token by token, because that is how x lies in memory.
  void pack(const MatrixView& x, int64_t batch, int64_t begin, int64_t end, int64_t token, int64_t count,
            const Acc* weight, Unit* packed) const {
    for (int64_t m = 0; m < count; m += S::kPack) {
      const T* row = row_of<T>(x, token + m) + batch * p.x_batch_stride;
      [[maybe_unused]] const T* next = m + 1 < count ? row_of<T>(x, token + m + 1) + batch * p.x_batch_stride : nullptr;
      for (int64_t j = begin; j < end; ++j) {
        const int64_t first = j * kCols, cols = min_of(kCols, x.cols - first), offset = first * x.col_stride;
        Unit* dst = packed + j * panel_size + m / S::kPack * kCols;
        if constexpr (S::kPack == 1) {
          widen_row<S>(row + offset, x.col_stride, cols, dst);
          if (weight) {
            for (int64_t c = 0; c < cols; ++c) dst[c] *= weight[token + m];
          }
        } else {
          interleave(row + offset, next ? next + offset : nullptr, x.col_stride, cols, dst);
        }
        for (int64_t c = cols; c < kCols; ++c) dst[c] = Unit{};
      }
    }
  }

  // One unit per column from two rows of x; a missing second row counts as zero.
  static void interleave(const T* low, const T* high, int64_t stride, int64_t cols, Unit* units) {
    if (high == nullptr) {
      for (int64_t c = 0; c < cols; ++c) units[c] = low[c * stride].bits;
    } else if (stride == 1) {
      for (int64_t c = 0; c < cols; ++c) units[c] = low[c].bits | static_cast<Unit>(high[c].bits) << 16;
    } else {
      for (int64_t c = 0; c < cols; ++c)
        units[c] = low[c * stride].bits | static_cast<Unit>(high[c * stride].bits) << 16;
    }
  }

  // The sums of the columns of a panel: a row of ones times the panel.
  void add_column_sums(int64_t batch, int64_t panel, int64_t count, const Unit* packed) const {
    const int64_t first = panel * kCols, cols = min_of(kCols, K - first), units = ceil_div(count, S::kPack);
    const Unit one = S::one();
    double sums[kCols] = {};
    alignas(64) Acc partial[kCols];
    for (int64_t u = 0; u < units; u += kBlock) {
      tile<S, 1, S::kVecs, kCols, FixedRows<Unit, 0, 0>, Unit, ToSums<S>>(
          min_of(kBlock, units - u), {&one}, packed + u * kCols, {partial, kCols, false});
      for (int64_t c = 0; c < kCols; ++c) sums[c] += static_cast<double>(partial[c]);
    }
    G* out = static_cast<G*>(p.column_sum) + batch * K + first;
    for (int64_t c = 0; c < cols; ++c) out[c] = static_cast<G>(out[c] + sums[c]);
  }

  // Blocks [begin, end), of the upper triangle column by column or of the whole matrix, for the packed tokens. `sums`
  // holds the blocks of earlier tokens where `accumulate` says that there were any; `last` adds them to gram.
  void multiply(int64_t begin, int64_t end, int64_t units, const Unit* left, const Unit* right, Acc* sums,
                bool accumulate, bool last, G* gram) const {
    alignas(64) Acc own[kCols * kCols];
    int64_t j = 0, first = 0;  // column panel, number of its first block
    while (first + blocks_in_column(j) <= begin) first += blocks_in_column(j++);
    for (int64_t block = begin; block < end; ++block) {
      if (block - first == blocks_in_column(j)) first += blocks_in_column(j++);
      const int64_t i = block - first;
      const bool diagonal = !cross && i == j;
      const Unit *a = left + i * panel_size, *b = right + j * panel_size;
      Acc* sum = sums ? sums + block * kCols * kCols : own;
      for (int64_t u = 0; u < units; u += kGramUnits) {
        const int64_t steps = min_of(kGramUnits, units - u);
        if (last) prefetch_for_write(i, j, gram, u * kCols / units, min_of(u + steps, units) * kCols / units);
        for (int64_t row = 0; row < kCols; row += kRows) {
          // Below the middle of a diagonal block, the left half of the columns is in the other triangle.
          const bool half = diagonal && row >= S::kLanes;
          const auto multiply = half ? tile<S, kRows, 1, kCols, Columns, Unit, ToSums<S>>
                                     : tile<S, kRows, 2, kCols, Columns, Unit, ToSums<S>>;
          const int64_t col = half ? S::kLanes : 0;
          multiply(steps, {a + u * kCols + row}, b + u * kCols + col,
                   {sum + row * kCols + col, kCols, accumulate || u > 0});
        }
      }
      if (last) flush(i, j, sum, gram);
    }
  }

  int64_t blocks_in_column(int64_t j) const { return cross ? row_panels : j + 1; }

  // Adds a block to gram, and its transpose to the other triangle.
  void flush(int64_t i, int64_t j, Acc* sum, G* gram) const {
    const int64_t row = i * kCols, col = j * kCols, rows = min_of(kCols, K - row), cols = min_of(kCols, N - col);
    if (!cross && i == j) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < r; ++c) sum[r * kCols + c] = sum[c * kCols + r];
      }
    }
    for (int64_t r = 0; r < rows; ++r) add_row(sum + r * kCols, cols, gram + (row + r) * N + col);
    if (cross || i == j) return;
    alignas(64) Acc transposed[kCols * kCols];
    transpose_block(sum, transposed);
    for (int64_t c = 0; c < cols; ++c) add_row(transposed + c * kCols, rows, gram + (col + c) * N + row);
  }

  static void transpose_block(const Acc* sum, Acc* transposed) {
    if constexpr (sizeof(Acc) == 4) {
      for (int64_t r = 0; r < kCols; r += S::kLanes) {
        for (int64_t c = 0; c < kCols; c += S::kLanes) {
          decltype(F32::zero()) rows[S::kLanes];
          for (int k = 0; k < S::kLanes; ++k) rows[k] = F32::load(sum + (r + k) * kCols + c);
          store_transposed(rows, transposed + c * kCols + r, kCols);
        }
      }
    } else {
      for (int64_t r = 0; r < kCols; ++r) {
        for (int64_t c = 0; c < kCols; ++c) transposed[c * kCols + r] = sum[r * kCols + c];
      }
    }
  }

  static void add_row(const Acc* sum, int64_t count, G* total) {
    for (int64_t c = 0; c < count; ++c) total[c] = static_cast<G>(total[c] + sum[c]);
  }

  // Rows [begin, end) of the places where a block and its transpose will be added: they come from memory while the
  // block is computed.
  void prefetch_for_write(int64_t i, int64_t j, const G* gram, int64_t begin, int64_t end) const {
    const int64_t row = i * kCols, col = j * kCols, rows = min_of(kCols, K - row), cols = min_of(kCols, N - col);
    for (int64_t r = begin; r < min_of(end, rows); ++r) prefetch_row(gram + (row + r) * N + col, cols);
    if (cross || i == j) return;
    for (int64_t c = begin; c < min_of(end, cols); ++c) prefetch_row(gram + (col + c) * N + row, rows);
  }

  static void prefetch_row(const G* row, int64_t count) {
    for (int64_t c = 0; c < count; c += kLine / static_cast<int64_t>(sizeof(G))) __builtin_prefetch(row + c, 1);
  }
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
