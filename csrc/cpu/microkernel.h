// The register tile that all products are made of, and the dot products for few rows.
// S is an arithmetic of the vector layer (simd_*.h), W the type that the right operand is stored in: S::Unit, or a
// 16-bit type that the tile widens as it loads. Included once by each file of kernels, after its target is set.
#pragma once

namespace mixrank {
namespace {

// Terms (in units) of one running sum. With 256 the rounding errors were twice those of the vendor's BLAS; 128 makes
// them equal or smaller, and 64 would cost 1 % of the speed.
constexpr int64_t kBlock = 128;

constexpr int64_t kLine = 64;  // bytes of a cache line

template <class S>
constexpr int64_t kTileCols = S::kLanes * S::kVecs;

// What a tile does with its sums: each block of terms goes to c, the last one may go further.
template <class S>
struct ToSums {
  using Acc = typename S::Acc;

  Acc* c;
  int64_t c_row;
  bool accumulate;  // c holds earlier terms

  typename S::V total(typename S::V acc, int i, int j) const {
    return accumulate ? S::add(acc, S::load(static_cast<const Acc*>(c + i * c_row + j * S::kLanes))) : acc;
  }
  void keep(typename S::V acc, int i, int j) const { S::store(c + i * c_row + j * S::kLanes, total(acc, i, j)); }
  void finish(typename S::V acc, int i, int j) const { keep(acc, i, j); }
};

// Rounds the sums into units of the left operand of a second product; c is only used between blocks of terms, unless
// the sums themselves are wanted too.
template <class S>
struct ToUnits : ToSums<S> {
  typename S::Unit* units;
  int64_t unit_row;
  bool sums_too;

  void finish(typename S::V acc, int i, int j) const {
    const typename S::V sum = this->total(acc, i, j);
    if (sums_too) S::store(this->c + i * this->c_row + j * S::kLanes, sum);
    S::store_units(units + i * unit_row + j * S::kLanes / S::kPack, sum);
  }
};

// Rounds the sums plus a bias into an output of type T; c is only used between blocks of terms.
template <class S, class T>
struct ToOutput : ToSums<S> {
  T* y;
  int64_t y_row;
  const T* bias;  // or null

  void finish(typename S::V acc, int i, int j) const {
    typename S::V sum = this->total(acc, i, j);
    if (bias) sum = S::add(sum, S::Wide::load(bias + j * S::kLanes));
    S::Wide::store(y + i * y_row + j * S::kLanes, sum);
  }
};

// Rows of a left operand kRow units apart, with kStep units from one step to the next: both fold into addresses.
template <class Unit, int kRow, int kStep = 1>
struct FixedRows {
  const Unit* at;

  template <int kM>
  struct Cursor {
    const Unit* at;

    explicit Cursor(const FixedRows& rows) : at(rows.at) {}
    const Unit* row(int i) const { return at + i * kRow; }
    void advance() { at += kStep; }
  };
};

// Rows of a left operand that lie any distance apart, with consecutive units: a matrix where the caller has it.
template <class Unit>
struct FreeRows {
  const Unit* at;
  int64_t row_stride;

  // Every third row has a pointer; an index of one or two row strides reaches the others.
  template <int kM>
  struct Cursor {
    const Unit* thirds[(kM + 2) / 3];
    int64_t row_stride;

    explicit Cursor(const FreeRows& rows) : row_stride(rows.row_stride) {
#pragma GCC unroll 8
      for (int i = 0; i < kM; i += 3) thirds[i / 3] = rows.at + i * row_stride;
    }
    const Unit* row(int i) const { return thirds[i / 3] + i % 3 * row_stride; }
    void advance() {
#pragma GCC unroll 8
      for (int i = 0; i < kM; i += 3) ++thirds[i / 3];
    }
  };
};

// Sums that one element is divided into, so that few rows too have enough independent multiply-adds in flight.
template <int kChains>
constexpr int kSplit = kChains >= 8   ? 1
                       : kChains >= 4 ? 2
                                      : 4;

// sum over s of unit s of row i of `left` times b[s * kBRow + j], for kM rows and kV vectors of columns, handed to
// `out`. No edges: the left operand has kM rows of `steps` units, and b is padded by whoever packs it.
template <class S, int kM, int kV, int kBRow, class Left, class W, class Out>
__attribute__((noinline)) void tile(int64_t steps, Left left, const W* b, Out out) {
  constexpr int kParts = kSplit<kM * kV>;
  typename Left::template Cursor<kM> a(left);
  while (true) {
    typename S::V acc[kParts][kM][kV];
#pragma GCC unroll 24
    for (int i = 0; i < kParts * kM * kV; ++i) acc[i / (kM * kV)][i / kV % kM][i % kV] = S::zero();
    const auto step = [&](typename S::V(&sum)[kM][kV]) {
      typename S::UnitV column[kV];
#pragma GCC unroll 2
      for (int j = 0; j < kV; ++j) column[j] = S::load(b + j * S::kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kM; ++i) {
        const typename S::UnitV row = S::broadcast(a.row(i));
#pragma GCC unroll 2
        for (int j = 0; j < kV; ++j) sum[i][j] = S::fma(row, column[j], sum[i][j]);
      }
      a.advance();
      b += kBRow;
    };
    const int64_t block = steps < kBlock ? steps : kBlock;
    int64_t s = 0;
    for (; s + kParts <= block; s += kParts) {
#pragma GCC unroll 4
      for (int q = 0; q < kParts; ++q) step(acc[q]);
    }
    for (; s < block; ++s) step(acc[0]);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kV; ++j) {
#pragma GCC unroll 4
        for (int q = 1; q < kParts; ++q) acc[0][i][j] = S::add(acc[0][i][j], acc[q][i][j]);
      }
    }
    steps -= block;
    if (steps == 0) {
#pragma GCC unroll 16
      for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kV; ++j) out.finish(acc[0][i][j], i, j);
      }
      return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kV; ++j) out.keep(acc[0][i][j], i, j);
    }
    out.accumulate = true;
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

template <class S>
using BlockRows = FixedRows<typename S::Unit, kRowStride<S>>;

template <class Left, class W, class Out>
using TileFn = void (*)(int64_t, Left, const W*, Out);

// The tiles with 1 to S::kRows rows, by kV vectors of columns that lie kBRow apart.
template <class S, int kV, int kBRow, class Left, class W, class Out, int... kRow>
inline TileFn<Left, W, Out> choose_tile(int64_t rows, std::integer_sequence<int, kRow...>) {
  static constexpr TileFn<Left, W, Out> kTiles[] = {tile<S, kRow + 1, kV, kBRow, Left, W, Out>...};
  return kTiles[rows - 1];
}

template <class S, int kV, int kBRow, class Left, class W, class Out>
inline TileFn<Left, W, Out> rows_tile(int64_t rows) {
  return choose_tile<S, kV, kBRow, Left, W, Out>(rows, std::make_integer_sequence<int, S::kRows>());
}

// Up to S::kRows rows times a panel of kTileCols columns, of which the first `cols` are wanted: as few vectors as hold
// them. Out<S> takes the sums, at(column) is the one that begins at a column.
template <class S, template <class> class Out, class Left, class W, class At>
inline void multiply_panel(int64_t rows, int64_t cols, int64_t steps, Left left, const W* b, const At& at) {
  static_assert(S::kVecs == 2, "a panel is one or two vectors wide");
  using Narrow = typename S::Narrow;
  constexpr int kBRow = kTileCols<S>;
  if constexpr (!std::is_void_v<Narrow>) {
    const int64_t whole = cols / S::kLanes * S::kLanes;
    if (cols - whole > 0 && cols - whole <= Narrow::kLanes) {
      if (whole > 0) rows_tile<S, 1, kBRow, Left, W, Out<S>>(rows)(steps, left, b, at(S(), 0));
      choose_tile<Narrow, 1, kBRow, Left, W, Out<Narrow>>(rows, std::make_integer_sequence<int, S::kRows>())(
          steps, left, b + whole, at(Narrow(), whole));
      return;
    }
  }
  if (cols <= S::kLanes) {
    rows_tile<S, 1, kBRow, Left, W, Out<S>>(rows)(steps, left, b, at(S(), 0));
  } else {
    rows_tile<S, 2, kBRow, Left, W, Out<S>>(rows)(steps, left, b, at(S(), 0));
  }
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
