// The implementation of lowrank_linear.h for one instruction set.
// Down is the arithmetic of the first product, Up that of the second, T the element type of the tensors.
#pragma once

#include "cpu/lowrank_linear.h"

namespace mixrank {
namespace {

// Up to here dot products along the weights' own rows beat packing the weights first.
constexpr int64_t kFewRows = 24;
// Row blocks that share one pass over the packed weights: their intermediate stays in L2.
constexpr int64_t kPanelBlocks = 8;
// Multiply-adds that are worth a thread of their own.
constexpr int64_t kWorkPerThread = 1 << 17;

template <class Down, class Up, class T>
struct LowrankLinear {
  using Acc = typename Up::Acc;
  using DownUnit = typename Down::Unit;
  static constexpr int64_t kRows = Up::kRows, kCols = kTileCols<Up>;
  static constexpr int64_t kBlockSize = kRows * kRowStride<Up>;
  static_assert(kTileCols<Down> == kCols && Down::kRows == kRows && kBlock % kCols == 0,
                "a tile of the first product is a piece of a row block of the second");

  const LowrankLinearParams& p;
  const int64_t M = p.x.rows, K = p.x.cols, R = p.down.rows, N = p.up.rows;
  const int64_t down_units = ceil_div(K, Down::kPack);
  const int64_t down_panels = ceil_div(R, kCols), up_panels = ceil_div(N, kCols);
  const int64_t hidden_blocks = ceil_div(R, kBlock);  // row blocks that hold the intermediate of kRows rows

  DownUnit* down = nullptr;  // [down_panels][down_units][kCols]
  Acc* up = nullptr;         // [up_panels][R][kCols]
  Acc* bias = nullptr;       // [up_panels * kCols]

  void run() {
    if (M == 0) return;
    if (M <= kFewRows && p.down.col_stride == 1 && p.up.col_stride == 1) {
      run_few_rows();
    } else {
      run_blocked();
    }
  }

  static void entry(const LowrankLinearParams& params) { LowrankLinear{params}.run(); }

  int64_t grain(int64_t count, int64_t work) const {
    return max_of(1, min_of(count, count * kWorkPerThread / max_of(work, 1)));
  }

  void widen_bias(int64_t padded) {
    memset(bias, 0, padded * sizeof(Acc));
    if (p.bias) widen_row<Up>(static_cast<const T*>(p.bias), p.bias_stride, N, bias);
  }

  // Row blocks [begin, end) of x by rank panels [panel, panel_end): fills `hidden`, whose first block is `begin`.
  void multiply_down(int64_t begin, int64_t end, int64_t panel, int64_t panel_end, DownUnit* packed, Acc* hidden) const {
    constexpr int64_t kElements = kBlock * Down::kPack, kPackedSize = kRows * kRowStride<Down>;
    for (int64_t k = 0; k < K; k += kElements) {
      const int64_t count = min_of(kElements, K - k), steps = ceil_div(count, Down::kPack);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t rows = min_of(kRows, M - i * kRows);
        pack_row_block<Down, T>(p.x, i * kRows, rows, k, count, packed + (i - begin) * kPackedSize);
      }
      for (int64_t j = panel; j < panel_end; ++j) {
        const DownUnit* weights = down + (j * down_units + k / Down::kPack) * kCols;
        const int64_t column = j * kCols, offset = (column / kBlock) * kBlockSize + column % kBlock;
        for (int64_t i = begin; i < end; ++i) {
          block_tile<Down>(min_of(kRows, M - i * kRows), R - column, steps, packed + (i - begin) * kPackedSize, weights,
                           hidden + (i - begin) * hidden_blocks * kBlockSize + offset, kRowStride<Up>, k > 0);
        }
      }
    }
  }

  // The same row blocks by columns of y [panel, panel_end).
  void multiply_up(int64_t begin, int64_t end, int64_t panel, int64_t panel_end, const Acc* hidden) const {
    alignas(64) Acc sum[kRows * kCols];
    for (int64_t j = panel; j < panel_end; ++j) {
      const int64_t cols = min_of(kCols, N - j * kCols);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t rows = min_of(kRows, M - i * kRows);
        for (int64_t r = 0; r < R; r += kBlock) {
          const Acc* block = hidden + ((i - begin) * hidden_blocks + r / kBlock) * kBlockSize;
          block_tile<Up>(rows, cols, min_of(kBlock, R - r), block, up + (j * R + r) * kCols, sum, kCols, r > 0);
        }
        T* out = static_cast<T*>(p.y) + i * kRows * N + j * kCols;
        for (int64_t row = 0; row < rows; ++row) store_row(sum + row * kCols, bias + j * kCols, cols, out + row * N);
      }
    }
  }

  static void store_row(const Acc* sum, const Acc* offset, int64_t cols, T* out) {
    int64_t j = 0;
    for (; j + Up::kLanes <= cols; j += Up::kLanes) Up::store(out + j, Up::add(Up::load(sum + j), Up::load(offset + j)));
    for (; j < cols; ++j) narrow(sum[j] + offset[j], out + j);
  }

  void run_blocked() {
    const int64_t row_blocks = ceil_div(M, kRows), threads = num_threads();
    const bool split_columns = row_blocks < threads;
    Arena arena;
    const int64_t down_at = arena.reserve<DownUnit>(down_panels * down_units * kCols);
    const int64_t up_at = arena.reserve<Acc>(up_panels * R * kCols);
    const int64_t bias_at = arena.reserve<Acc>(up_panels * kCols);
    const int64_t hidden_size = hidden_blocks * kBlockSize;
    const int64_t hidden_at = arena.reserve<Acc>(split_columns ? row_blocks * hidden_size : 0);
    void* base = scratch(Scratch::kCall, arena.bytes);
    down = at_offset<DownUnit>(base, down_at);
    up = at_offset<Acc>(base, up_at);
    bias = at_offset<Acc>(base, bias_at);
    widen_bias(up_panels * kCols);
    const int64_t panels = down_panels + up_panels;
    parallel(panels, grain(panels, 16 * R * (K + N)), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        if (j < down_panels) {
          pack_panel<Down, T>(p.down, j * kCols, down + j * down_units * kCols);
        } else {
          pack_panel<Up, T>(p.up, (j - down_panels) * kCols, up + (j - down_panels) * R * kCols);
        }
      }
    });
    if (split_columns) {
      run_split_columns(row_blocks, at_offset<Acc>(base, hidden_at));
      return;
    }
    const int64_t row_panels = min_of(row_blocks, round_up(ceil_div(row_blocks, kPanelBlocks), threads));
    parallel(row_panels, grain(row_panels, M * R * (K + N)), [&](int64_t first, int64_t last) {
      const int64_t most = ceil_div(row_blocks, row_panels);
      Arena local;
      const int64_t packed_at = local.reserve<DownUnit>(most * kRows * kRowStride<Down>);
      const int64_t local_hidden_at = local.reserve<Acc>(most * hidden_size);
      void* own = scratch(Scratch::kWorker, local.bytes);
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t begin = panel * row_blocks / row_panels, end = (panel + 1) * row_blocks / row_panels;
        Acc* hidden = at_offset<Acc>(own, local_hidden_at);
        multiply_down(begin, end, 0, down_panels, at_offset<DownUnit>(own, packed_at), hidden);
        multiply_up(begin, end, 0, up_panels, hidden);
      }
    });
  }

  // Fewer row blocks than threads: all threads share the rows and divide the columns of both products.
  void run_split_columns(int64_t row_blocks, Acc* hidden) {
    parallel(down_panels, grain(down_panels, M * R * K), [&](int64_t begin, int64_t end) {
      auto* packed = static_cast<DownUnit*>(
          scratch(Scratch::kWorker, row_blocks * kRows * kRowStride<Down> * sizeof(DownUnit)));
      multiply_down(0, row_blocks, begin, end, packed, hidden);
    });
    parallel(up_panels, grain(up_panels, M * R * N),
             [&](int64_t begin, int64_t end) { multiply_up(0, row_blocks, begin, end, hidden); });
  }

  // out[m, n] = dot(rows[m], weight[n]) (+ bias) for weight rows [begin, end), along the weights' own memory.
  template <class S, class Store>
  static void dot_rows(int64_t M, const typename S::Unit* rows, int64_t row_size, const MatrixView& weight,
                       int64_t begin, int64_t end, const Store& store) {
    constexpr int kN = S::kDotCols, kM = S::kDotRows;
    Acc sums[kM * kN];
    for (int64_t n = begin; n < end; n += kN) {
      const T* w[kN];
      for (int64_t i = 0; i < kN; ++i) w[i] = row_of<T>(weight, min_of(n + i, end - 1));
      const int64_t valid = min_of(kN, end - n);
      for (int64_t m = 0; m < M;) {
        const auto* x = rows + m * row_size;
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
    const int64_t x_size = round_up(down_units, Down::kLanes), hidden_size = round_up(R, Up::kLanes);
    Arena arena;
    const int64_t x_at = arena.reserve<DownUnit>(M * x_size);
    const int64_t hidden_at = arena.reserve<Acc>(M * hidden_size);
    const int64_t bias_at = arena.reserve<Acc>(N);
    void* base = scratch(Scratch::kCall, arena.bytes);
    auto* x = at_offset<DownUnit>(base, x_at);
    auto* hidden = at_offset<Acc>(base, hidden_at);
    bias = at_offset<Acc>(base, bias_at);
    widen_bias(N);
    memset(x, 0, M * x_size * sizeof(DownUnit));
    memset(hidden, 0, M * hidden_size * sizeof(Acc));
    for (int64_t m = 0; m < M; ++m) unit_row<Down>(row_of<T>(p.x, m), p.x.col_stride, K, x + m * x_size);
    parallel(R, grain(R, M * R * K), [&](int64_t begin, int64_t end) {
      dot_rows<Down>(M, x, x_size, p.down, begin, end,
                     [&](int64_t m, int64_t r, Acc sum) { hidden[m * hidden_size + r] = sum; });
    });
    parallel(N, grain(N, M * R * N), [&](int64_t begin, int64_t end) {
      dot_rows<Up>(M, hidden, hidden_size, p.up, begin, end, [&](int64_t m, int64_t n, Acc sum) {
        narrow(sum + bias[n], static_cast<T*>(p.y) + m * N + n);
      });
    });
  }
};

template <class BfloatDown>
void lowrank_linear_kernel(const LowrankLinearParams& params) {
  switch (params.dtype) {
    case Dtype::kFloat32:
      return LowrankLinear<F32, F32, float>::entry(params);
    case Dtype::kFloat64:
      return LowrankLinear<F64, F64, double>::entry(params);
    case Dtype::kBFloat16:
      return LowrankLinear<BfloatDown, F32, BFloat>::entry(params);
    case Dtype::kFloat16:
      return LowrankLinear<F32, F32, Half>::entry(params);
  }
}

}  // namespace
}  // namespace mixrank
