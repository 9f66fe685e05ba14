// The register tile that both products are made of, and the dot products for few rows.
// S is an arithmetic of the vector layer (simd_*.h). Included once by each file of kernels, after its target is set.
#pragma once

namespace mixrank {
namespace {

// Terms (in units) of one running sum. With 256 the rounding errors were twice those of the vendor's BLAS; 64 makes them
// equal or smaller and costs 1 to 5 % of the speed.
constexpr int64_t kBlock = 64;

template <class S>
constexpr int64_t kTileCols = S::kLanes* S::kVecs;

// c[i, j] (+)= sum over s of a[i * kARow + s * kAStep] * b[s * kTileCols + j], for kM rows and kV vectors of columns.
// No edges: a and b are padded by whoever packs them.
template <class S, int kM, int kV, int kARow, int kAStep>
__attribute__((noinline)) void tile(int64_t steps, const typename S::Unit* a, const typename S::Unit* b,
                                    typename S::Acc* c, int64_t c_row, bool accumulate) {
  typename S::V acc[kM][kV];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kV; ++j) acc[i][j] = S::zero();
  }
  for (int64_t s = 0; s < steps; ++s) {
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
    b += kTileCols<S>;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kV; ++j) {
      typename S::Acc* out = c + i * c_row + j * S::kLanes;
      S::store(out, accumulate ? S::add(acc[i][j], S::load(static_cast<const typename S::Acc*>(out))) : acc[i][j]);
    }
  }
}

// Row blocks are stored as [kRows][kRowStride]: a constant stride folds into the addresses of the tile, and one extra
// cache line per row keeps the rows of a block out of each other's cache sets.
template <class S>
constexpr int kRowStride = kBlock + 64 / sizeof(typename S::Unit);

// Rows that the tile computes for `rows` valid ones: whole thirds of kRows.
template <class S>
inline int64_t tile_rows(int64_t rows) {
  return round_up(rows, S::kRows / 3);
}

// One tile of a row block; `rows` and `cols` say how much of it is wanted.
template <class S>
inline void block_tile(int64_t rows, int64_t cols, int64_t steps, const typename S::Unit* a, const typename S::Unit* b,
                       typename S::Acc* c, int64_t c_row, bool accumulate) {
  static_assert(S::kVecs == 2 && S::kRows % 3 == 0, "the choice below lists every shape");
  constexpr int kThird = S::kRows / 3, kARow = kRowStride<S>;
  const bool narrow_tile = cols <= S::kLanes;
  using Fn = void (*)(int64_t, const typename S::Unit*, const typename S::Unit*, typename S::Acc*, int64_t, bool);
  static constexpr Fn kTiles[3][2] = {
      {tile<S, kThird, 1, kARow, 1>, tile<S, kThird, 2, kARow, 1>},
      {tile<S, 2 * kThird, 1, kARow, 1>, tile<S, 2 * kThird, 2, kARow, 1>},
      {tile<S, 3 * kThird, 1, kARow, 1>, tile<S, 3 * kThird, 2, kARow, 1>},
  };
  kTiles[(rows - 1) / kThird][narrow_tile ? 0 : 1](steps, a, b, c, c_row, accumulate);
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

}  // namespace
}  // namespace mixrank
