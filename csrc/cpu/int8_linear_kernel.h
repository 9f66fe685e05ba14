// The implementation of int8_linear.h for one instruction set.
//
// A row panel (a few row blocks of at most kRows rows) goes through everything at once: its rows of x become the left
// operand of the first product (codes, or fp32), which fills the intermediate in fp32, whose rows become the left
// operand of the second product. Both are made of the register tile of microkernel.h: with Int8 of simd_int8_*.h its
// sums are int32; with F32 it widens the codes as it loads them.
#pragma once

#include "cpu/int8_linear.h"
#include "cpu/packed_int8.h"

namespace mixrank {
namespace {

// How a row of codes is turned back: value = scale * (code - zero). Of no use for rows in fp32.
struct RowCode {
  float scale;
  int32_t zero;
};

// Rows whose values span less count as zero, so that 255 / span stays finite.
constexpr float kLeastSpan = 0x1p-100f;
// Multiply-adds of codes that are worth a thread of their own.
constexpr int64_t kCodesPerThread = 1 << 20;

// Turns sums into y = sum * scale of the row * scale of the column + bias. c is only used between blocks of terms.
template <class S>
struct Dequantise : ToSums<S> {
  float* y;
  int64_t y_row;
  const RowCode* rows;
  const float* scale;
  const float* bias;
  const int32_t* column_sum;

  void finish(typename S::V acc, int i, int j) const {
    typename S::V sum = this->total(acc, i, j);
    const auto column_scale = F32::load(scale + j * S::kLanes), column_bias = F32::load(bias + j * S::kLanes);
    float* out = y + i * y_row + j * S::kLanes;
    if constexpr (std::is_same_v<typename S::Acc, float>) {
      F32::store(out, F32::fma(sum, column_scale, column_bias));
    } else {
      if constexpr (S::kHasZero) {
        sum = S::subtract_product(sum, S::all(rows[i].zero), S::load(column_sum + j * S::kLanes));
      }
      const auto both = S::multiply(F32::broadcast(&rows[i].scale), column_scale);
      F32::store(out, F32::fma(S::to_float(sum), both, column_bias));
    }
  }
};

// S multiplies: Int8 for codes on both sides, F32 for rows that are not quantised. T is the element type of x and y.
template <class S, class T>
struct alignas(kLine) Int8LinearKernel {
  using Unit = typename S::Unit;
  static constexpr int64_t kRows = S::kRows, kCols = kTileCols<S>;
  static constexpr bool kDynamic = std::is_same_v<S, Int8>;
  static_assert(S::kLanes == F32::kLanes && kTileCols<F32> == kCols, "sums become fp32 vector by vector");

  const Int8LinearParams& p;
  const PackedInt8<S> packed{p};
  const bool is_lowrank = p.count == 2;
  const int64_t M = p.x.rows, K = p.x.cols, R = is_lowrank ? p.weight[0].rows : 0;
  const int64_t rest = p.weight[p.count - 1].rows;  // columns of the last product
  const int64_t N = rest + (p.index ? R : 0);
  // Sums of codes are exact, however rows are divided; the order of those in fp32 depends on the rows of a block.
  const int64_t even_threads = kDynamic ? num_threads() : kEvenThreads;
  const int64_t block_rows = ceil_div(M, round_up(ceil_div(M, kRows), M < kEvenRows ? 1 : even_threads));
  const int64_t row_blocks = ceil_div(M, block_rows);
  const int64_t x_row = left_row(K), hidden_row = left_row(R);
  const int64_t sum_row = round_up(R, kCols), rest_row = p.index ? round_up(rest, kCols) : 0;
  const void* weights = p.packed;
  const float* scale[2] = {};  // of the columns of each product, padded with zeros to whole panels
  const float* bias[2] = {};
  const float* sum_bias = nullptr;  // [R]: with an index, of the columns that are the intermediate

  // Buffers of some rows.
  struct alignas(kLine) Panel {
    Unit* x;         // [rows][x_row]
    RowCode* x_code;  // [rows]
    float* sum;      // [rows][sum_row]: the intermediate
    Unit* hidden;    // [rows][hidden_row]: the same as a left operand; not used where that is sum itself
    RowCode* hidden_code;
    float* rest;   // [rows][rest_row]: with an index, the second product
    float* spare;  // one row of x in fp32
  };

  // A left operand: rows of units.
  struct Rows {
    const Unit* at;
    int64_t row;
    const RowCode* code;
  };

  static void entry(const Int8LinearParams& params) {
    if (params.x.rows > 0) Int8LinearKernel{params}.run();
  }

  // Units between rows of `count` elements: an odd number of cache lines, so that rows do not share cache sets.
  static int64_t left_row(int64_t count) {
    const int64_t bytes = ceil_div(count, S::kPack) * static_cast<int64_t>(sizeof(Unit));
    return (ceil_div(bytes, kLine) | 1) * kLine / static_cast<int64_t>(sizeof(Unit));
  }

  int64_t rows_of(int64_t begin, int64_t end) const { return min_of(M, end * block_rows) - begin * block_rows; }

  int64_t grain(int64_t count, int64_t codes) const {
    const int64_t threads = max_of(M * codes / kCodesPerThread, codes / kWeightsPerThread);
    return ceil_div(count, max_of(1, min_of(count, threads)));
  }

  void run() {
    prepare_columns();
    if (weights == nullptr) {
      void* own = scratch(Scratch::kFactors, packed.bytes);
      packed.pack(own);
      weights = own;
    }
    if (row_blocks < num_threads()) {
      run_split_columns();
    } else {
      run_row_panels();
    }
  }

  // Scales and biases of the columns in the order of the products.
  void prepare_columns() {
    Arena arena;
    int64_t scale_at[2], bias_at[2];
    for (int64_t f = 0; f < p.count; ++f) {
      scale_at[f] = arena.reserve<float>(packed.panels[f] * kCols);
      bias_at[f] = arena.reserve<float>(packed.panels[f] * kCols);
    }
    const int64_t sum_bias_at = arena.reserve<float>(R);
    void* base = scratch(Scratch::kCall, arena.bytes);
    memset(base, 0, arena.bytes);
    for (int64_t f = 0; f < p.count; ++f) {
      scale[f] = at_offset<float>(base, scale_at[f]), bias[f] = at_offset<float>(base, bias_at[f]);
      memcpy(at_offset<float>(base, scale_at[f]), p.weight[f].scale, p.weight[f].rows * sizeof(float));
    }
    sum_bias = at_offset<float>(base, sum_bias_at);
    if (p.bias == nullptr) return;
    const auto bias_of = [&](int64_t n) { return static_cast<float>(widen(static_cast<const T*>(p.bias)[n * p.bias_stride])); };
    float* last = at_offset<float>(base, bias_at[p.count - 1]);
    for (int64_t n = 0; n < rest; ++n) last[n] = bias_of(p.index ? p.index[R + n] : n);
    for (int64_t r = 0; p.index && r < R; ++r) at_offset<float>(base, sum_bias_at)[r] = bias_of(p.index[r]);
  }

  Panel panel(int64_t rows) const {
    Arena arena;
    const int64_t x_at = arena.reserve<Unit>(rows * x_row), x_code_at = arena.reserve<RowCode>(rows);
    const int64_t sum_at = arena.reserve<float>(rows * sum_row);
    const int64_t hidden_at = arena.reserve<Unit>(kDynamic ? rows * hidden_row : 0);
    const int64_t hidden_code_at = arena.reserve<RowCode>(rows), rest_at = arena.reserve<float>(rows * rest_row);
    const int64_t spare_at = arena.reserve<float>(round_up(K, S::kLanes));
    void* base = scratch(Scratch::kWorker, arena.bytes);
    return {at_offset<Unit>(base, x_at),           at_offset<RowCode>(base, x_code_at),
            at_offset<float>(base, sum_at),        at_offset<Unit>(base, hidden_at),
            at_offset<RowCode>(base, hidden_code_at), at_offset<float>(base, rest_at),
            at_offset<float>(base, spare_at)};
  }

  void run_row_panels() {
    const int64_t row_bytes = (x_row + (kDynamic ? hidden_row : 0)) * static_cast<int64_t>(sizeof(Unit)) +
                              (sum_row + rest_row) * static_cast<int64_t>(sizeof(float));
    const int64_t most = max_of(1, min_of(kPanelBlocks, kPanelBytes / (block_rows * row_bytes)));
    const int64_t row_panels = min_of(row_blocks, round_up(ceil_div(row_blocks, most), num_threads()));
    const int64_t codes = p.weight[0].rows * K + (is_lowrank ? rest * R : 0);
    parallel(row_panels, grain(row_panels, codes), [&](int64_t first, int64_t end_panel) {
      const Panel own = panel(ceil_div(row_blocks, row_panels) * block_rows);
      for (int64_t i = first; i < end_panel; ++i) {
        const int64_t begin = i * row_blocks / row_panels, end = (i + 1) * row_blocks / row_panels;
        quantise_x(begin, end, own);
        if (is_lowrank) multiply_down(begin, end, 0, packed.panels[0], own);
        multiply_last(begin, end, 0, packed.panels[p.count - 1], own);
        if (p.index) scatter(begin, end, own);
      }
    });
  }

  // Fewer row blocks than threads: all threads share the rows and divide the columns of each product.
  void run_split_columns() {
    const Panel shared = panel(M);
    quantise_x(0, row_blocks, shared);
    if (is_lowrank) {
      parallel(packed.panels[0], grain(packed.panels[0], R * K), [&](int64_t first, int64_t end) {
        multiply(0, 0, row_blocks, first, end, x_rows(shared), shared.sum, sum_row);
      });
      quantise_hidden(0, row_blocks, shared);
    }
    const int64_t panels = packed.panels[p.count - 1];
    parallel(panels, grain(panels, rest * (is_lowrank ? R : K)),
             [&](int64_t first, int64_t end) { multiply_last(0, row_blocks, first, end, shared); });
    if (p.index) scatter(0, row_blocks, shared);
  }

  Rows x_rows(const Panel& panel) const { return {panel.x, x_row, panel.x_code}; }

  Rows hidden_rows(const Panel& panel) const {
    if constexpr (kDynamic) {
      return {panel.hidden, hidden_row, panel.hidden_code};
    } else {
      return {panel.sum, sum_row, nullptr};
    }
  }

  void multiply_down(int64_t begin, int64_t end, int64_t first, int64_t end_panel, const Panel& panel) const {
    multiply(0, begin, end, first, end_panel, x_rows(panel), panel.sum, sum_row);
    quantise_hidden(begin, end, panel);
  }

  void multiply_last(int64_t begin, int64_t end, int64_t first, int64_t end_panel, const Panel& panel) const {
    const Rows left = is_lowrank ? hidden_rows(panel) : x_rows(panel);
    if (p.index) {
      multiply(1, begin, end, first, end_panel, left, panel.rest, rest_row);
    } else {
      multiply(p.count - 1, begin, end, first, end_panel, left, static_cast<T*>(p.y) + begin * block_rows * N, N);
    }
  }

  // Row blocks [begin, end) by panels [first, end_panel) of weight f. `left` and `out` start at the first of the rows;
  // rows of `out` that have room for whole panels may be written beyond their last column.
  template <class Out>
  void multiply(int64_t f, int64_t begin, int64_t end, int64_t first, int64_t end_panel, const Rows& left, Out* out,
                int64_t out_row) const {
    alignas(64) typename S::Acc partial[kRows * kCols];
    alignas(64) float values[kRows * kCols];
    const bool has_room = out_row >= packed.panels[f] * kCols;
    for (int64_t j = first; j < end_panel; ++j) {
      const int64_t cols = min_of(kCols, p.weight[f].rows - j * kCols);
      const auto* b = packed.codes(weights, f, j);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = (i - begin) * block_rows, rows = rows_of(i, i + 1);
        Out* to = out + row * out_row + j * kCols;
        float* y = values;
        int64_t y_row = kCols;
        if constexpr (std::is_same_v<Out, float>) {
          if (cols == kCols || has_room) y = to, y_row = out_row;
        }
        const FreeRows<Unit> a{left.at + row * left.row, left.row};
        const Dequantise<S> finish{{partial, kCols, false}, y, y_row, left.code + row, scale[f] + j * kCols,
                                   bias[f] + j * kCols, packed.sums(weights, f, j)};
        using Tile = TileFn<FreeRows<Unit>, Codes<S::kPack>, Dequantise<S>>;
        const Tile tile = cols <= S::kLanes
                              ? rows_tile<S, 1, kCols, FreeRows<Unit>, Codes<S::kPack>, Dequantise<S>>(rows)
                              : rows_tile<S, 2, kCols, FreeRows<Unit>, Codes<S::kPack>, Dequantise<S>>(rows);
        tile(packed.units[f], a, b, finish);
        if (y == values) {
          for (int64_t m = 0; m < rows; ++m) narrow_row(values + m * kCols, cols, to + m * out_row);
        }
      }
    }
  }

  template <class Out>
  static void narrow_row(const float* values, int64_t count, Out* out) {
    int64_t n = 0;
    for (; n + F32::kLanes <= count; n += F32::kLanes) F32::store(out + n, F32::load(values + n));
    for (; n < count; ++n) narrow(values[n], out + n);
  }

  // y from the intermediate and the rest of its columns, each at its place.
  void scatter(int64_t begin, int64_t end, const Panel& panel) const {
    for (int64_t m = 0; m < rows_of(begin, end); ++m) {
      T* y = static_cast<T*>(p.y) + (begin * block_rows + m) * N;
      for (int64_t r = 0; r < R; ++r) narrow(panel.sum[m * sum_row + r] + sum_bias[r], y + p.index[r]);
      for (int64_t n = 0; n < rest; ++n) narrow(panel.rest[m * rest_row + n], y + p.index[R + n]);
    }
  }

  void quantise_x(int64_t begin, int64_t end, const Panel& panel) const {
    for (int64_t m = 0; m < rows_of(begin, end); ++m) {
      const T* row = row_of<T>(p.x, begin * block_rows + m);
      Unit* to = panel.x + m * x_row;
      if constexpr (kDynamic) {
        if constexpr (std::is_same_v<T, float>) {
          if (p.x.col_stride == 1 && K % S::kLanes == 0) {
            panel.x_code[m] = quantise(row, K, to);
            continue;
          }
        }
        widen_row<F32>(row, p.x.col_stride, K, panel.spare);
        panel.x_code[m] = quantise_padded(panel.spare, K, to);
      } else {
        widen_row<F32>(row, p.x.col_stride, K, to);
      }
    }
  }

  void quantise_hidden(int64_t begin, int64_t end, const Panel& panel) const {
    if constexpr (kDynamic) {
      for (int64_t m = 0; m < rows_of(begin, end); ++m) {
        panel.hidden_code[m] = quantise_padded(panel.sum + m * sum_row, R, panel.hidden + m * hidden_row);
      }
    }
  }

  // A row that has room for whole vectors; zeros there change nothing.
  static RowCode quantise_padded(float* row, int64_t count, Unit* to) {
    const int64_t whole = round_up(count, S::kLanes);
    memset(row + count, 0, (whole - count) * sizeof(float));
    return quantise(row, whole, to);
  }

  // Codes of whole vectors of values, 0 among what they can express.
  static RowCode quantise(const float* row, int64_t count, Unit* to) {
    const float none = 0;
    auto low = F32::zero(), high = F32::zero(), nothing = F32::zero();
    for (int64_t k = 0; k < count; k += S::kLanes) {
      const auto values = F32::load(row + k);
      low = Int8::least(values, low), high = Int8::largest(values, high);
      nothing = F32::fma(values, F32::broadcast(&none), nothing);  // NaN if a value is not finite
    }
    float lows[S::kLanes], highs[S::kLanes], nothings[S::kLanes];
    F32::store(lows, low), F32::store(highs, high), F32::store(nothings, nothing);
    for (int i = 1; i < S::kLanes; ++i) {
      lows[0] = lows[i] < lows[0] ? lows[i] : lows[0];
      highs[0] = highs[i] > highs[0] ? highs[i] : highs[0];
      nothings[0] += nothings[i];
    }
    const float span = highs[0] - lows[0];
    const bool is_finite = nothings[0] == 0 && span * 0 == 0;
    const float inverse = is_finite && span > kLeastSpan ? 255 / span : 0;
    const int32_t zero = inverse > 0 ? static_cast<int32_t>(__builtin_rintf(-lows[0] * inverse)) : 0;
    const auto factor = F32::broadcast(&inverse);
    const auto offset = Int8::all(zero), shift = Int8::all(Int8::kHasZero ? 0 : zero);
    auto* left = reinterpret_cast<typename Int8::Left*>(to);
    for (int64_t k = 0; k < count; k += S::kLanes) {
      const auto code = Int8::add(Int8::round(Int8::multiply(F32::load(row + k), factor)), offset);
      Int8::store_left(left + k, Int8::subtract(Int8::clamp(code, 0, 255), shift));
    }
    return {is_finite ? span / 255 : __builtin_nanf(""), zero};
  }
};

// Calls work(Int8LinearKernel<S, T>*) for the dtype of the tensors.
template <class Work>
auto with_int8_kernel(const Int8LinearParams& params, const Work& work) {
  const auto with = [&](auto* arithmetic) {
    using S = std::remove_pointer_t<decltype(arithmetic)>;
    switch (params.dtype) {
      case Dtype::kBFloat16:
        return work(static_cast<Int8LinearKernel<S, BFloat>*>(nullptr));
      case Dtype::kFloat16:
        return work(static_cast<Int8LinearKernel<S, Half>*>(nullptr));
      default:
        return work(static_cast<Int8LinearKernel<S, float>*>(nullptr));
    }
  };
  return params.dynamic ? with(static_cast<Int8*>(nullptr)) : with(static_cast<F32*>(nullptr));
}

inline void int8_linear_kernel(const Int8LinearParams& params) {
  with_int8_kernel(params, [&](auto* op) { op->entry(params); });
}

// The bytes of packed codes; writes them where `to` is not null.
inline int64_t int8_pack_kernel(const Int8LinearParams& params, void* to) {
  const auto pack = [&](const auto& packed) {
    if (to) packed.pack(to);
    return packed.bytes;
  };
  return params.dynamic ? pack(PackedInt8<Int8>(params)) : pack(PackedInt8<F32>(params));
}

}  // namespace
}  // namespace mixrank
