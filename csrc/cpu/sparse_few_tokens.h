// The implementation of sparse_linear.h for a few tokens, along the rows of S where the caller has them: a tile of tokens
// would be mostly empty, and packing takes as long as many products. The bits of the mask spread the values that follow
// over the lanes of their features. For vector layers that can expand. Included by sparse_linear_kernel.h alone, for one
// instruction set.
#pragma once

#include "cpu/lowrank_linear_kernel.h"
#include "cpu/sparse_linear.h"

namespace mixrank {
namespace {

// Up to here expanding each vector of S is cheaper than multiplying its entries one by one, if one in eight is stored.
constexpr int64_t kFewTokens = 4;
constexpr int64_t kFewEntries = 8;

template <class S, class T>
struct alignas(kLine) SparseFewTokens {
  using Acc = typename S::Acc;
  using V = typename S::V;
  using Dots = LowrankLinear<S, T>;
  static constexpr int64_t kLanes = S::kLanes;

  const SparseLinearParams& p;
  const int64_t M = p.x.rows, K = p.x.cols, N = p.N, R = p.down.rows;
  const int64_t mask_row = ceil_div(K, 8);
  const int64_t x_row = round_up(K, kLanes), hidden_row = round_up(R, kLanes);

  static bool serves(const SparseLinearParams& p) {
    const bool along_rows = p.down.rows == 0 || (p.down.col_stride == 1 && p.up.col_stride == 1);
    const bool pays = p.packed == nullptr || p.count * kFewEntries >= p.N * p.x.cols;
    return p.x.rows <= kFewTokens && along_rows && pays && p.scale == nullptr;
  }

  // The least of `count` parts of M * weights multiply-adds that a thread should take.
  int64_t grain(int64_t count, int64_t weights) const {
    return ceil_div(count, max_of(1, min_of(count, M * weights / kWorkPerThread)));
  }

  void run() const {
    Arena arena;
    const int64_t x_at = arena.reserve<Acc>(M * x_row), hidden_at = arena.reserve<Acc>(M * hidden_row);
    const int64_t sum_at = arena.reserve<Acc>(R > 0 ? M * N : 0);
    void* base = scratch(Scratch::kCall, arena.bytes);
    auto* x = at_offset<Acc>(base, x_at);
    auto* hidden = at_offset<Acc>(base, hidden_at);
    auto* sum = at_offset<Acc>(base, sum_at);
    memset(base, 0, sum_at);
    for (int64_t m = 0; m < M; ++m) widen_row<S>(row_of<T>(p.x, m), p.x.col_stride, K, x + m * x_row);
    parallel(R, grain(R, R * K), [&](int64_t begin, int64_t end) {
      Dots::dot_rows(M, x, x_row, p.down, begin, end,
                     [&](int64_t m, int64_t r, Acc value) { hidden[m * hidden_row + r] = value; });
    });
    parallel(N, grain(N, p.count + R * N), [&](int64_t begin, int64_t end) {
      if (R > 0) {
        Dots::dot_rows(M, hidden, hidden_row, p.up, begin, end,
                       [&](int64_t m, int64_t n, Acc value) { sum[m * N + n] = value; });
      }
      of_tokens(std::make_integer_sequence<int, kFewTokens>())(*this, x, R > 0 ? sum : nullptr, begin, end);
    });
  }

  using RowsFn = void (*)(const SparseFewTokens&, const Acc* x, const Acc* sum, int64_t begin, int64_t end);

  template <int... kM>
  RowsFn of_tokens(std::integer_sequence<int, kM...>) const {
    static constexpr RowsFn kRows[] = {multiply_rows<kM + 1>...};
    return kRows[M - 1];
  }

  // Rows [begin, end) of S and of y, with `sum` added where it is not null.
  template <int kM>
  static void multiply_rows(const SparseFewTokens& op, const Acc* x, const Acc* sum, int64_t begin, int64_t end) {
    const SparseLinearParams& p = op.p;
    int64_t taken = 0;
    for (int64_t i = 0; i < begin * op.mask_row; ++i) taken += __builtin_popcount(p.mask[i]);
    const T* values = static_cast<const T*>(p.values);
    for (int64_t n = begin; n < end; ++n) {
      // A vector of values is loaded whole, which the last of them are not followed by. Nor does a mask that was written
      // to unnoticed, with packed weights at hand, have as many bits as there are values.
      const int64_t rest = max_of(0, p.count - taken);
      const T* from = values + taken;
      if (rest < op.K + kLanes) {
        const int64_t kept = min_of(rest, op.K);
        T* own = static_cast<T*>(scratch(Scratch::kRows, (op.K + kLanes) * sizeof(T)));
        memcpy(own, from, kept * sizeof(T));
        memset(own + kept, 0, (op.K + kLanes - kept) * sizeof(T));
        from = own;
      }
      Acc sums[kM];
      taken += multiply_row<kM>(op, p.mask + n * op.mask_row, from, x, sums);
      for (int64_t m = 0; m < kM; ++m) {
        if (sum) sums[m] += sum[m * op.N + n];
        if (p.bias) sums[m] += widen(static_cast<const T*>(p.bias)[n * p.bias_stride]);
        narrow(sums[m], static_cast<T*>(p.y) + m * op.N + n);
      }
    }
  }

  // One row of S times all tokens; returns how many values it has.
  template <int kM>
  static int64_t multiply_row(const SparseFewTokens& op, const uint8_t* mask, const T* values, const Acc* x,
                              Acc* sums) {
    const T* value = values;
    V acc[2][kM];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kM; ++i) acc[i / kM][i % kM] = S::zero();
    const auto step = [&](uint32_t lanes, int64_t k, V(&to)[kM]) {
      const V weight = S::expand(lanes, S::load(value));
      value += __builtin_popcount(lanes);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) to[m] = S::fma_where(lanes, weight, S::load(x + m * op.x_row + k), to[m]);
    };
    constexpr int64_t kBytes = kLanes / 8;
    int64_t byte = 0;
    for (; byte + 2 * kBytes <= op.mask_row; byte += 2 * kBytes) {
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) step(lanes_at<kBytes>(mask + byte + q * kBytes), (byte + q * kBytes) * 8, acc[q]);
    }
    for (; byte < op.mask_row; byte += kBytes) {
      const bool whole = byte + kBytes <= op.mask_row;
      step(whole ? lanes_at<kBytes>(mask + byte) : mask[byte], byte * 8, acc[0]);
    }
    for (int m = 0; m < kM; ++m) sums[m] = S::reduce(S::add(acc[0][m], acc[1][m]));
    return value - values;
  }

  template <int64_t kBytes>
  static uint32_t lanes_at(const uint8_t* mask) {
    static_assert(kBytes == 1 || kBytes == 2, "a vector has eight or sixteen lanes");
    return kBytes == 2 ? mask[0] | static_cast<uint32_t>(mask[1]) << 8 : mask[0];
  }
};

}  // namespace
}  // namespace mixrank
