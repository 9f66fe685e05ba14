// The implementation of lowrank_linear.h for one instruction set.
//
// A row panel (a few row blocks of at most kRows rows) goes through everything at once: its rows of x, packed unless
// they can be read where they are, are multiplied by all panels of down into the intermediate, which stays in L2, and
// this by all panels of up; the blocks of S read the same rows, always packed, and add to the same tile before it is
// rounded into y. A second low-rank term is part of the packed factors, as further rows of down and columns of up.
// With an index the intermediate is a part of y, and each tile goes to y together with the columns between its own.
#pragma once

#include "cpu/lowrank_linear.h"
#include "cpu/packed_factors.h"

namespace mixrank {
namespace {

// Up to here dot products along the weights' own rows beat packing the weights first.
constexpr int64_t kFewRows = 24;
// What a row panel may hold of x and of the intermediate: most of an L2 cache, beside one panel of weights.
constexpr int64_t kPanelBytes = 448 << 10;
constexpr int64_t kPanelBlocks = 8;
// Rows at a multiple of this distance share the sets of an L1 cache.
constexpr int64_t kPageBytes = 4096;
// Bytes of weights that are worth a thread of their own where rows of x are few.
constexpr int64_t kWeightsPerThread = 96 << 10;
// Numbers of threads that divide rows evenly: the blocks of enough rows are a multiple of it.
constexpr int64_t kEvenThreads = 4;
constexpr int64_t kEvenRows = 32;

// An input or output beyond this comes from memory; a smaller one is still in the caches.
constexpr int64_t kLarge = 1 << 20;

// S is the arithmetic of both products, T the element type of the tensors. What all threads read has cache lines of its
// own, away from what the first of them writes to its stack.
template <class S, class T>
struct alignas(kLine) LowrankLinear {
  using Acc = typename S::Acc;
  using Unit = typename S::Unit;
  using W = Stored<S, T>;
  using Blocks = BlockRows<S>;
  using Wide = typename S::Wide;  // of the accumulators
  using Sums = ToSums<S>;
  static constexpr int64_t kRows = S::kRows, kCols = kTileCols<S>;
  static constexpr bool kConverts = S::kPack > 1;  // the intermediate is not in the accumulator's type
  static_assert(Wide::kRows == kRows && kTileCols<Wide> == kCols && kInner % kCols == 0,
                "a tile of the first product is a piece of a row block of the second");

  const LowrankLinearParams& p;
  const PackedFactors<S, T> packed{p};
  const int64_t M = p.x.rows, K = packed.K, N = packed.N, R = packed.R;
  const int64_t work = R * (K + packed.up_rows);  // multiply-adds for a row of x
  // Not a matter of the number of threads, which therefore changes no sum.
  const int64_t block_rows = ceil_div(M, round_up(ceil_div(M, kRows), M < kEvenRows ? 1 : kEvenThreads));
  const int64_t row_blocks = ceil_div(M, block_rows);
  const int64_t x_size = ceil_div(packed.k_units, kInner) * kRowBlockSize<S>;  // of kRows rows, packed
  const int64_t sum_size = ceil_div(R, kInner) * kRowBlockSize<Wide>;          // of their intermediate
  const int64_t hidden_size = kConverts ? ceil_div(packed.r_units, kInner) * kRowBlockSize<S> : sum_size;
  const bool x_as_it_is = can_read_x();
  const void* weights = p.packed;

  // Buffers of `blocks` row blocks.
  struct alignas(kLine) Panel {
    Unit* x;       // [blocks][x_size]
    Acc* sum;      // [blocks][sum_size]: x @ down^T
    Unit* hidden;  // [blocks][hidden_size]: the same as an operand; sum itself where nothing is converted
  };

  static void entry(const LowrankLinearParams& params) {
    if (params.x.rows > 0) LowrankLinear{params}.run();
  }

  void run() {
    const bool along_rows = p.down[0].col_stride == 1 && p.up[0].col_stride == 1 && p.down[1].rows == 0;
    if (weights == nullptr && M <= kFewRows && along_rows && p.blocks.size == 0) {
      run_few_rows();
    } else {
      run_blocked();
    }
  }

  // The least of `count` parts that a thread should take, where all of them multiply x by `weights` elements. What
  // runs as one region for each product is given half of both, so that either both divide their work or none does.
  int64_t grain(int64_t count, int64_t weights) const {
    const int64_t bytes = weights * static_cast<int64_t>(sizeof(W));
    const int64_t threads = max_of(M * weights / kWorkPerThread, bytes / kWeightsPerThread);
    return ceil_div(count, max_of(1, min_of(count, threads)));
  }

  int64_t rows_of_block(int64_t block) const { return min_of(block_rows, M - block * block_rows); }

  // Whether the first product can read x where it is: its elements are the units, its rows do not all fall into the
  // same sets of the L1 cache, and there are no blocks, which read row blocks.
  bool can_read_x() const {
    if constexpr (sizeof(T) * S::kPack != sizeof(Unit)) {
      return false;
    } else {
      const int64_t row_bytes = p.x.row_stride * static_cast<int64_t>(sizeof(T));
      return p.x.col_stride == 1 && p.x.row_offsets == nullptr && K % S::kPack == 0 && p.blocks.count == 0 &&
             row_bytes % sizeof(Unit) == 0 && reinterpret_cast<uintptr_t>(p.x.data) % sizeof(Unit) == 0 &&
             (M < kRows || row_bytes % kPageBytes != 0);
    }
  }

  void pack_x(int64_t begin, int64_t end, const Panel& panel) const {
    for (int64_t i = begin; !x_as_it_is && i < end; ++i) {
      pack_rows<S, T>(p.x, i * block_rows, rows_of_block(i), panel.x + (i - begin) * x_size);
    }
  }

  // Row blocks [begin, end) by panels [first, last) of down: fills their intermediate.
  void multiply_down(int64_t begin, int64_t end, int64_t first, int64_t last, const Panel& panel) const {
    if (x_as_it_is) {
      const auto* x = static_cast<const Unit*>(p.x.data);
      const int64_t row_stride = p.x.row_stride / S::kPack;
      multiply_down(begin, end, first, last, panel, [&](int64_t i, int64_t k) {
        return FreeRows<Unit>{x + i * block_rows * row_stride + k, row_stride};
      });
    } else {
      multiply_down(begin, end, first, last, panel, [&](int64_t i, int64_t k) {
        return Blocks{panel.x + (i - begin) * x_size + place<S>(k)};
      });
    }
  }

  // x_at(i, k) is row block i from unit k on.
  template <class At>
  void multiply_down(int64_t begin, int64_t end, int64_t first, int64_t last, const Panel& panel,
                     const At& x_at) const {
    const W* down = at_offset<W>(weights, packed.down_at);
    for (int64_t k = 0; k < packed.k_units; k += kInner) {
      const int64_t steps = min_of(kInner, packed.k_units - k);
      const bool finishes = k + steps == packed.k_units;
      for (int64_t j = first; j < last; ++j) {
        const W* b = down + (j * packed.k_units + k) * kCols;
        const int64_t cols = min_of(kCols, R - j * kCols);
        for (int64_t i = begin; i < end; ++i) {
          Acc* sum = panel.sum + (i - begin) * sum_size + place<Wide>(j * kCols);
          const int64_t rows = rows_of_block(i);
          if constexpr (kConverts) {
            if (finishes) {
              Unit* hidden = panel.hidden + (i - begin) * hidden_size + place<S>(j * kCols / S::kPack);
              multiply_panel<S, ToUnits>(rows, cols, steps, x_at(i, k), b, [&](auto arithmetic, int64_t column) {
                return ToUnits<decltype(arithmetic)>{
                    {sum + column, kRowStride<Wide>, k > 0}, hidden + column / S::kPack, kRowStride<S>, p.pivoted};
              });
              if (cols % 2 != 0) clear_half_unit(rows, hidden + cols / 2);
              continue;
            }
          }
          multiply_panel<S, ToSums>(rows, cols, steps, x_at(i, k), b, [&](auto arithmetic, int64_t column) {
            return ToSums<decltype(arithmetic)>{sum + column, kRowStride<Wide>, k > 0};
          });
        }
      }
    }
  }

  // Where unit `unit` of the first row lies in row blocks of arithmetic A.
  template <class A>
  static int64_t place(int64_t unit) {
    return unit / kInner * kRowBlockSize<A> + unit % kInner;
  }

  // The high half of the last units, beyond an odd rank: zero also where x is not finite.
  static void clear_half_unit(int64_t rows, Unit* units) {
    for (int64_t row = 0; row < rows; ++row) units[row * kRowStride<S>] &= 0xffff;
  }

  // Row blocks [begin, end) for `tiles` tiles of other work.
  RowsAhead<T> rows_ahead(int64_t begin, int64_t end, int64_t tiles) const {
    const int64_t lines = ceil_div(K * static_cast<int64_t>(sizeof(T)), kLine);
    const bool pays = !x_as_it_is && p.x.col_stride == 1 && M * K * static_cast<int64_t>(sizeof(T)) > kLarge;
    const int64_t row = begin * block_rows, last = pays ? min_of(M, end * block_rows) : row;
    return {p.x, row, last, ceil_div((last - row) * lines, tiles)};
  }

  // Row blocks [begin, end) by columns of y, panels [first, last) of up.
  void multiply_up(int64_t begin, int64_t end, int64_t first, int64_t last, const Panel& panel,
                   RowsAhead<T> ahead) const {
    const W* up = at_offset<W>(weights, packed.up_at);
    const auto* merge = at_offset<MergePanel>(weights, packed.merge_at);
    const bool large = M * N * static_cast<int64_t>(sizeof(T)) > kLarge;
    alignas(64) Acc sum[kRows * kCols + Wide::kLanes];  // merging reads whole vectors
    for (int64_t j = first; j < last; ++j) {
      const int64_t cols = min_of(kCols, packed.up_rows - j * kCols);
      const int64_t column = p.pivoted ? merge[j].column : j * kCols;
      const int64_t width = p.pivoted ? merge[j + 1].column - column : cols;
      for (int64_t i = begin; i < end; ++i) {
        ahead.fetch();
        const int64_t rows = rows_of_block(i);
        T* out = static_cast<T*>(p.y) + i * block_rows * N + column;
        for (int64_t row = 0; large && row < rows; ++row) fetch(out + row * N, width);
        // The last units go from the registers to y, unless more is to be added or a panel is not full.
        const bool direct =
            !p.pivoted && cols == kCols && p.blocks.count == 0 && (p.bias == nullptr || p.bias_stride == 1);
        const int64_t kept = cols == 0 ? 0 : direct ? (packed.r_units - 1) / kInner * kInner : packed.r_units;
        for (int64_t r = 0; r < kept; r += kInner) {
          const Blocks hidden{panel.hidden + (i - begin) * hidden_size + r / kInner * kRowBlockSize<S>};
          const W* b = up + (j * packed.r_units + r) * kCols;
          multiply_panel<S, ToSums>(rows, cols, min_of(kInner, packed.r_units - r), hidden, b,
                                    [&](auto arithmetic, int64_t column) {
                                      return ToSums<decltype(arithmetic)>{sum + column, kCols, r > 0};
                                    });
        }
        if (direct) {
          const Blocks hidden{panel.hidden + (i - begin) * hidden_size + kept / kInner * kRowBlockSize<S>};
          const T* bias = p.bias ? static_cast<const T*>(p.bias) + j * kCols : nullptr;
          rows_tile<S, 2, kCols, Blocks, W, ToOutput<S, T>>(rows)(packed.r_units - kept, hidden,
                                                           up + (j * packed.r_units + kept) * kCols,
                                                           {{sum, kCols, kept > 0}, out, N, bias});
          continue;
        }
        if (p.pivoted) {
          merge_tile(j, rows, panel.sum + (i - begin) * sum_size, sum, out - column);
          continue;
        }
        if (p.blocks.count > 0) add_blocks(j * kCols, cols, rows, panel.x + (i - begin) * x_size, sum);
        for (int64_t row = 0; row < rows; ++row) store_row(sum + row * kCols, j * kCols, cols, out + row * N);
      }
    }
  }

  // The columns of y that panel j of the second product completes, for one row block.
  void merge_tile(int64_t j, int64_t rows, const Acc* hidden, const Acc* sum, T* y) const {
    const auto* merge = at_offset<MergePanel>(weights, packed.merge_at) + j;
    const auto* steps = at_offset<MergeStep<Wide>>(weights, packed.steps_at);
    merge_columns<Wide>(steps + merge[0].step, steps + merge[1].step, rows, hidden, sum, kCols,
                        static_cast<const T*>(p.bias), p.bias_stride, y, N);
  }

  // sum += x @ S^T for columns [column, column + cols) of y and one row block of x.
  void add_blocks(int64_t column, int64_t cols, int64_t rows, const Unit* x, Acc* sum) const {
    const int64_t b = p.blocks.size, width = packed.block_width;
    const W* values = at_offset<W>(weights, packed.values_at);
    const auto multiply =
        width == kCols ? rows_tile<S, 2, kCols, Blocks, W, Sums>(rows) : rows_tile<S, 1, kCols / 2, Blocks, W, Sums>(rows);
    for (int64_t n = column; n < column + cols; n += width) {
      for (int64_t e = p.blocks.crow[n / b]; e < p.blocks.crow[n / b + 1]; ++e) {
        const int64_t unit = p.blocks.col[e] * packed.block_units;
        multiply(packed.block_units, {x + place<S>(unit)},
                 values + e * b * packed.block_units + n % b * packed.block_units, {sum + (n - column), kCols, true});
      }
    }
  }

  // Lines of y come from memory into L2 while the tile is computed, or its stores would wait for them. Not into L1: the
  // rows of a wide y share its sets.
  static void fetch(const T* out, int64_t cols) {
    for (int64_t j = 0; j < cols; j += kLine / sizeof(T)) __builtin_prefetch(out + j, 0, 2);
  }

  // out = sum + bias for `cols` columns from `column` on.
  void store_row(const Acc* sum, int64_t column, int64_t cols, T* out) const {
    int64_t j = 0;
    if (p.bias == nullptr) {
      for (; j + Wide::kLanes <= cols; j += Wide::kLanes) Wide::store(out + j, Wide::load(sum + j));
      for (; j < cols; ++j) narrow(sum[j], out + j);
      return;
    }
    const T* bias = static_cast<const T*>(p.bias) + column * p.bias_stride;
    if (p.bias_stride == 1) {
      for (; j + Wide::kLanes <= cols; j += Wide::kLanes) {
        Wide::store(out + j, Wide::add(Wide::load(sum + j), Wide::load(bias + j)));
      }
    }
    for (; j < cols; ++j) narrow(sum[j] + widen(bias[j * p.bias_stride]), out + j);
  }

  Panel panel_in(Scratch slot, int64_t blocks) const {
    Arena arena;
    const int64_t x_at = arena.reserve<Unit>(x_as_it_is ? 0 : blocks * x_size), sum_at = arena.reserve<Acc>(blocks * sum_size);
    const int64_t hidden_at = kConverts ? arena.reserve<Unit>(blocks * hidden_size) : sum_at;
    void* base = scratch(slot, arena.bytes);
    return {at_offset<Unit>(base, x_at), at_offset<Acc>(base, sum_at), at_offset<Unit>(base, hidden_at)};
  }

  void run_blocked() {
    if (weights == nullptr) {
      void* own = scratch(Scratch::kFactors, packed.bytes);
      packed.pack(own);
      weights = own;
    }
    const int64_t threads = num_threads();
    if (row_blocks < threads) {
      run_split_columns();
      return;
    }
    const int64_t block_bytes = (x_size + hidden_size) * sizeof(Unit) + (kConverts ? sum_size * sizeof(Acc) : 0);
    const int64_t most = max_of(1, min_of(kPanelBlocks, kPanelBytes / block_bytes));
    const int64_t row_panels = min_of(row_blocks, round_up(ceil_div(row_blocks, most), threads));
    parallel(row_panels, grain(row_panels, work), [&](int64_t first, int64_t last) {
      const Panel panel = panel_in(Scratch::kWorker, ceil_div(row_blocks, row_panels));
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i * row_blocks / row_panels, end = (i + 1) * row_blocks / row_panels;
        pack_x(begin, end, panel);
        multiply_down(begin, end, 0, packed.down_panels, panel);
        const int64_t after = i + 1 < last ? (i + 2) * row_blocks / row_panels : end;
        multiply_up(begin, end, 0, packed.y_panels, panel, rows_ahead(end, after, (end - begin) * packed.y_panels));
      }
    });
  }

  // Fewer row blocks than threads: all threads share the rows and divide the columns of both products.
  void run_split_columns() {
    const Panel panel = panel_in(Scratch::kCall, row_blocks);
    pack_x(0, row_blocks, panel);
    parallel(packed.down_panels, grain(packed.down_panels, work / 2),
             [&](int64_t begin, int64_t end) { multiply_down(0, row_blocks, begin, end, panel); });
    parallel(packed.y_panels, grain(packed.y_panels, work / 2),
             [&](int64_t begin, int64_t end) { multiply_up(0, row_blocks, begin, end, panel, rows_ahead(0, 0, 1)); });
  }

  // out[m, n] = dot(rows[m], weight[n]) (+ bias) for weight rows [begin, end), along the weights' own memory.
  template <class Store>
  static void dot_rows(int64_t M, const Unit* rows, int64_t row_size, const MatrixView& weight, int64_t begin,
                       int64_t end, const Store& store) {
    constexpr int kN = S::kDotCols, kM = S::kDotRows;
    Acc sums[kM * kN];
    for (int64_t n = begin; n < end; n += kN) {
      const T* w[kN];
      for (int64_t i = 0; i < kN; ++i) w[i] = row_of<T>(weight, min_of(n + i, end - 1));
      const int64_t valid = min_of(kN, end - n);
      for (int64_t m = 0; m < M;) {
        const Unit* x = rows + m * row_size;
        const int64_t taken = M - m >= kM ? kM : M - m >= 2 ? 2 : 1;
        if (taken == kM) {
          dot_tile<S, kM, kN>(weight.cols, x, row_size, w, sums);
        } else if (taken == 2) {
          dot_tile<S, 2, kN>(weight.cols, x, row_size, w, sums);
        } else {
          dot_tile<S, 1, kN>(weight.cols, x, row_size, w, sums);
        }
        for (int64_t i = 0; i < taken; ++i) {
          for (int64_t j = 0; j < valid; ++j) store(m + i, n + j, sums[i * kN + j]);
        }
        m += taken;
      }
    }
  }

  void run_few_rows() {
    const int64_t x_row = round_up(packed.k_units, S::kLanes), hidden_row = round_up(packed.r_units, S::kLanes);
    Arena arena;
    const int64_t x_at = arena.reserve<Unit>(M * x_row), hidden_at = arena.reserve<Unit>(M * hidden_row);
    const int64_t sum_at = arena.reserve<Acc>(M * R);
    void* base = scratch(Scratch::kCall, arena.bytes);
    auto* x = at_offset<Unit>(base, x_at);
    auto* hidden = at_offset<Unit>(base, hidden_at);
    auto* sum = at_offset<Acc>(base, sum_at);
    memset(x, 0, M * x_row * sizeof(Unit));
    memset(hidden, 0, M * hidden_row * sizeof(Unit));
    for (int64_t m = 0; m < M; ++m) unit_row<S>(row_of<T>(p.x, m), p.x.col_stride, K, x + m * x_row);
    parallel(R, grain(R, work / 2), [&](int64_t begin, int64_t end) {
      dot_rows(M, x, x_row, p.down[0], begin, end, [&](int64_t m, int64_t r, Acc value) { sum[m * R + r] = value; });
    });
    for (int64_t m = 0; m < M; ++m) {
      if constexpr (kConverts) {
        auto* rounded = reinterpret_cast<T*>(hidden + m * hidden_row);
        for (int64_t r = 0; r < R; ++r) narrow(sum[m * R + r], rounded + r);
      } else {
        memcpy(hidden + m * hidden_row, sum + m * R, R * sizeof(Acc));
      }
    }
    const T* bias = static_cast<const T*>(p.bias);
    const auto store = [&](int64_t m, int64_t n, Acc value) {
      narrow(bias ? value + widen(bias[n * p.bias_stride]) : value, static_cast<T*>(p.y) + m * N + n);
    };
    for (int64_t i = 0; p.pivoted && i < M * R; ++i) store(i / R, p.index[i % R], sum[i]);
    parallel(packed.up_rows, grain(packed.up_rows, work / 2), [&](int64_t begin, int64_t end) {
      dot_rows(M, hidden, hidden_row, p.up[0], begin, end,
               [&](int64_t m, int64_t n, Acc value) { store(m, p.pivoted ? p.index[R + n] : n, value); });
    });
  }
};

// Calls work(LowrankLinear<S, T>*) for the dtype of the tensors.
template <class BfloatPairs, class Work>
auto with_arithmetic(Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::kFloat64:
      return work(static_cast<LowrankLinear<F64, double>*>(nullptr));
    case Dtype::kBFloat16:
      return work(static_cast<LowrankLinear<BfloatPairs, BFloat>*>(nullptr));
    case Dtype::kFloat16:
      return work(static_cast<LowrankLinear<F32, Half>*>(nullptr));
    default:
      return work(static_cast<LowrankLinear<F32, float>*>(nullptr));
  }
}

template <class BfloatPairs>
void lowrank_linear_kernel(const LowrankLinearParams& params) {
  with_arithmetic<BfloatPairs>(params.dtype, [&](auto* op) { op->entry(params); });
}

// The header of packed factors; writes the factors themselves where `packed` is not null.
template <class BfloatPairs>
int64_t lowrank_pack_kernel(const LowrankLinearParams& params, void* packed) {
  return with_arithmetic<BfloatPairs>(params.dtype, [&](auto* op) {
    const decltype(op->packed) factors{params};
    if (packed) factors.pack(packed);
    return factors.bytes;
  });
}

}  // namespace
}  // namespace mixrank
