// The register tile that all products are made of, and the dot products for few rows.
// S is an arithmetic of the vector layer (simd_*.h), W the type that the right operand is stored in: S::Unit, or a
// 16-bit type that the tile widens as it loads. Included once by each file of kernels, after its target is set.
#pragma once

namespace mixrank {
namespace {

// Terms (in units) of one running sum. With 256 the rounding errors were twice those of the vendor's BLAS; 64 makes them
// equal or smaller and costs 1 % of the speed.
constexpr int64_t kBlock = 64;

constexpr int64_t kLine = 64;  // bytes of a cache line

template <class S>
constexpr int64_t kTileCols = S::kLanes* S::kVecs;

// c[i, j] (+)= sum over s of a[i * kARow + s * kAStep] * b[s * kBRow + j], for kM rows and kV vectors of columns.
// No edges: a and b are padded by whoever packs them.
template <class S, int kM, int kV, int kARow, int kAStep, int kBRow, class W>
__attribute__((noinline)) void tile(int64_t steps, const typename S::Unit* a, const W* b, typename S::Acc* c,
                                    int64_t c_row, bool accumulate) {
  while (steps > 0) {
    typename S::V acc[kM][kV];
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kV; ++j) acc[i][j] = S::zero();
    }
    const int64_t block = steps < kBlock ? steps : kBlock;
    for (int64_t s = 0; s < block; ++s) {
      typename S::UnitV column[kV];
#pragma GCC unroll 2
      for (int j = 0; j < kV; ++j) column[j] = S::load(b + j * S::kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kM; ++i) {
        const typename S::UnitV row = S::broadcast(a + i * kARow);
#pragma GCC unroll 2
        for (int j = 0; j < kV; ++j) acc[i][j] = S::fma(row, column[j], acc[i][j]);
      }
      a += kAStep;
      b += kBRow;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kV; ++j) {
        typename S::Acc* out = c + i * c_row + j * S::kLanes;
        S::store(out, accumulate ? S::add(acc[i][j], S::load(static_cast<const typename S::Acc*>(out))) : acc[i][j]);
      }
    }
    accumulate = true;
    steps -= block;
  }
}

// Rows of x are stored as row blocks: [kRows][kRowStride] for every kInner units of the inner dimension. A constant
// stride folds into the addresses of the tile, and the odd number of cache lines keeps the rows of a block out of each
// other's cache sets.
constexpr int64_t kInner = 384;
template <class S>
constexpr int kRowStride = kInner + 64 / sizeof(typename S::Unit);
template <class S>
constexpr int64_t kRowBlockSize = S::kRows * kRowStride<S>;

// Row counts that tiles exist for.
template <class S>
constexpr int kTileRows[] = {1, 2, S::kRows / 3, 2 * (S::kRows / 3), S::kRows};

template <class S>
inline int tile_index(int64_t rows) {
  int index = 0;
  while (kTileRows<S>[index] < rows) ++index;
  return index;
}

// Rows that the tile computes for `rows` valid ones.
template <class S>
inline int64_t tile_rows(int64_t rows) {
  return kTileRows<S>[tile_index<S>(rows)];
}

template <class S, class W>
using TileFn = void (*)(int64_t, const typename S::Unit*, const W*, typename S::Acc*, int64_t, bool);

// The tile of a row block for `rows` rows, by kV vectors of columns that lie kBRow apart.
template <class S, int kV, int kBRow, class W>
inline TileFn<S, W> block_tile(int64_t rows) {
  static_assert(S::kVecs == 2 && S::kRows % 3 == 0, "the choice below lists every shape");
  constexpr int kARow = kRowStride<S>;
  static constexpr TileFn<S, W> kTiles[] = {
      tile<S, kTileRows<S>[0], kV, kARow, 1, kBRow, W>, tile<S, kTileRows<S>[1], kV, kARow, 1, kBRow, W>,
      tile<S, kTileRows<S>[2], kV, kARow, 1, kBRow, W>, tile<S, kTileRows<S>[3], kV, kARow, 1, kBRow, W>,
      tile<S, kTileRows<S>[4], kV, kARow, 1, kBRow, W>,
  };
  return kTiles[tile_index<S>(rows)];
}

// The same for a panel of kTileCols columns, of which `cols` are wanted.
template <class S, class W>
inline TileFn<S, W> panel_tile(int64_t rows, int64_t cols) {
  constexpr int kBRow = kTileCols<S>;
  return cols <= S::kLanes ? block_tile<S, 1, kBRow, W>(rows) : block_tile<S, 2, kBRow, W>(rows);
}
// out[m * kN + n] = dot(x[m], w[n]) over `length` elements. x is zero-padded to whole vectors, w is not.
template <class S, int kM, int kN, class T>
inline void dot_tile(int64_t length, const typename S::Unit* x, int64_t x_row, const T* const* w,
                     typename S::Acc* out) {
  constexpr int64_t kStep = S::kLanes * S::kPack;
  typename S::V acc[kM][kN];
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) acc[m][n] = S::zero();
  }
  const auto step = [&](const typename S::Unit* x_at, const T* const* w_at, int64_t offset) {
    typename S::UnitV row[kM];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) row[m] = S::load(x_at + m * x_row);
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      const typename S::UnitV weight = S::load(w_at[n] + offset);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) acc[m][n] = S::fma(row[m], weight, acc[m][n]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep) step(x + k / S::kPack, w, k);
  if (k < length) {
    T tail[kN][kStep];
    const T* tails[kN];
    memset(tail, 0, sizeof(tail));
    for (int n = 0; n < kN; ++n) {
      memcpy(tail[n], w[n] + k, (length - k) * sizeof(T));
      tails[n] = tail[n];
    }
    step(x + k / S::kPack, tails, 0);
  }
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) out[m * kN + n] = S::reduce(acc[m][n]);
  }
}

// Multiply-adds on registers alone, as many independent ones as a tile has: the ceiling that a tile can reach.
template <class S>
__attribute__((noinline)) int64_t multiply_add_loop(int64_t steps) {
  constexpr int kChains = 2 * S::kRows;
  typename S::V acc[kChains];
  const typename S::Unit one = S::one();
  const typename S::UnitV a = S::broadcast(&one), b = S::broadcast(&one);
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) {
    acc[i] = S::zero();
    asm volatile("" : "+m"(acc[i]));  // a chain of its own, for all that the compiler knows
  }
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = S::fma(a, b, acc[i]);
  }
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(acc[i]));
  return steps * kChains * S::kLanes * S::kPack * 2;
}

}  // namespace
}  // namespace mixrank
