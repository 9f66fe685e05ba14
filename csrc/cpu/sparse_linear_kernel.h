// The implementation of sparse_linear.h for one instruction set.
//
// Tokens are what is in the lanes. A tile of tokens goes through S chunk by chunk of features: their part of x is
// transposed into a panel [features][tokens] in the L1 cache, of which each stored entry multiplies one row and adds it
// to the sums [rows of S][tokens], which stay in the L2 cache. The intermediate of the factors is made from the same
// panels, and after the last chunk the second factor adds it to the sums, which are transposed into y and rounded there.
// For a few tokens sparse_few_tokens.h has another way.
#pragma once

#include "cpu/packed_sparse.h"
#include "cpu/sparse_few_tokens.h"

namespace mixrank {
namespace {

// Bytes of sums that stay in the L2 cache beside what they are made of.
constexpr int64_t kSumBytes = 384 << 10;
// Tiles of at least this many vectors have enough independent sums for one chain each, and so make the same ones: rows
// may be divided among such tiles as the threads like it, and narrower ones take several chains.
constexpr int kWideVecs = 4;

// rows[i][j] to dst[j * stride + i].
template <class S>
inline void store_block_transposed(const typename S::V* rows, typename S::Acc* dst, int64_t stride) {
  if constexpr (sizeof(typename S::Acc) == 4) {
    store_transposed(rows, dst, stride);
  } else {
    typename S::Acc row[S::kLanes];
    for (int i = 0; i < S::kLanes; ++i) {
      S::store(row, rows[i]);
      for (int j = 0; j < S::kLanes; ++j) dst[j * stride + i] = row[j];
    }
  }
}

// sums[row] (+)= the entries of each row times their features, for kV vectors of tokens out of kStride.
template <class S, int kV, int kStride>
__attribute__((noinline)) void multiply_entries(const SparseRow* rows, int64_t count, const uint16_t* place,
                                                const typename S::Acc* value, const typename S::Acc* panel,
                                                typename S::Acc* sums, bool accumulate) {
  using Acc = typename S::Acc;
  constexpr int kParts = kV >= kWideVecs ? 1 : kSplit<kV>;
  constexpr int64_t kRow = kStride * S::kLanes;
  for (int64_t i = 0; i < count; ++i) {
    Acc* sum = sums + rows[i].row * kRow;
    if (i + 1 < count) {
      const Acc* next = sums + rows[i + 1].row * kRow;
#pragma GCC unroll 8
      for (int64_t j = 0; j < kV * S::kLanes; j += kLine / sizeof(Acc)) __builtin_prefetch(next + j, 1);
    }
    typename S::V acc[kParts][kV];
#pragma GCC unroll 16
    for (int j = 0; j < kParts * kV; ++j) acc[j / kV][j % kV] = S::zero();
    const auto step = [&](typename S::V(&to)[kV]) {
      const auto* x = reinterpret_cast<const Acc*>(reinterpret_cast<const char*>(panel) + *place++ * int64_t{kStride});
      const typename S::V weight = S::broadcast(value++);
#pragma GCC unroll 8
      for (int j = 0; j < kV; ++j) to[j] = S::fma(weight, S::load(x + j * S::kLanes), to[j]);
    };
    int64_t rest = rows[i].count;
    constexpr int kTaken = kParts > 2 ? kParts : 2;
    for (; rest >= kTaken; rest -= kTaken) {
#pragma GCC unroll 4
      for (int q = 0; q < kTaken; ++q) step(acc[q % kParts]);
    }
    for (; rest > 0; --rest) step(acc[0]);
#pragma GCC unroll 8
    for (int j = 0; j < kV; ++j) {
#pragma GCC unroll 4
      for (int q = 1; q < kParts; ++q) acc[0][j] = S::add(acc[0][j], acc[q][j]);
      Acc* to = sum + j * S::kLanes;
      S::store(to, accumulate ? S::add(acc[0][j], S::load(static_cast<const Acc*>(to))) : acc[0][j]);
    }
  }
}

// S is the arithmetic, T the element type of the tensors. What all threads read has cache lines of its own.
template <class S, class T>
struct alignas(kLine) SparseLinear {
  using Acc = typename S::Acc;
  using V = typename S::V;
  using Packed = PackedSparse<S, T>;
  static constexpr int64_t kLanes = S::kLanes;
  static constexpr int kVecs = kTokenVecs;
  static constexpr int64_t kTokens = kVecs * kLanes;
  static constexpr int64_t kPassGroups = kSumBytes / (kGroup * kVecs * static_cast<int64_t>(sizeof(V)));

  const SparseLinearParams& p;
  const Packed packed{p};
  const int64_t M = p.x.rows, K = packed.K, N = packed.N, R = packed.R;
  const int64_t work = p.count + R * (K + N);  // multiply-adds for a token
  const int64_t vectors = ceil_div(M, kLanes);
  const int64_t tiles = number_of_tiles();
  const void* weights = p.packed;

  // As few as there can be, or as many more as the threads divide evenly.
  int64_t number_of_tiles() const {
    const int64_t least = ceil_div(vectors, kVecs), even = round_up(least, num_threads());
    return vectors / max_of(1, even) >= kWideVecs ? even : least;
  }

  struct Range {
    int64_t begin, end;
  };

  // What a thread works on. In a tile of one vector the rows of all three are one vector long, else kVecs; vectors past
  // the tokens hold anything.
  struct Buffers {
    Acc* panel;   // [kChunk<S>][kTokens]
    Acc* sums;    // [kPassGroups * kGroup][kTokens]
    Acc* hidden;  // [R][kTokens]
  };

  static void entry(const SparseLinearParams& params) {
    if (params.x.rows == 0) return;
    if constexpr (S::kExpands) {
      if (SparseFewTokens<S, T>::serves(params)) return SparseFewTokens<S, T>{params}.run();
    }
    SparseLinear{params}.run();
  }

  void run() {
    if (weights == nullptr) {
      void* own = scratch(Scratch::kFactors, packed.bytes);
      packed.pack(own);
      weights = own;
    }
    const int64_t grain = max_of(1, kWorkPerThread / max_of(1, work * kTokens));
    if (tiles < num_threads() && M * work > kWorkPerThread) {
      run_split_rows();
      return;
    }
    parallel(tiles, grain, [&](int64_t begin, int64_t end) {
      const Buffers buffers = buffers_in(Scratch::kWorker, true);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t group = 0; group < packed.groups; group += kPassGroups) {
          const Range groups{group, min_of(packed.groups, group + kPassGroups)};
          on_tile(i, buffers, {0, group == 0 ? R : 0}, groups);
        }
      }
    });
  }

  // Fewer tiles than threads: the threads divide the rows of down, and then those of S.
  void run_split_rows() {
    auto* hidden = static_cast<Acc*>(scratch(Scratch::kCall, max_of(1, tiles * R * kTokens) * sizeof(Acc)));
    constexpr int64_t kRows = S::kRows;
    const int64_t parts = ceil_div(R, kRows), groups = packed.groups;
    parallel(tiles * parts, grain(tiles * parts, R * K), [&](int64_t begin, int64_t end) {
      Buffers buffers = buffers_in(Scratch::kWorker, false);
      for_tiles(begin, end, parts, [&](int64_t i, Range range) {
        buffers.hidden = hidden + i * R * kTokens;
        on_tile(i, buffers, {range.begin * kRows, min_of(R, range.end * kRows)}, {0, 0});
      });
    });
    parallel(tiles * groups, grain(tiles * groups, p.count + R * N), [&](int64_t begin, int64_t end) {
      Buffers buffers = buffers_in(Scratch::kWorker, false);
      for_tiles(begin, end, groups, [&](int64_t i, Range range) {
        buffers.hidden = hidden + i * R * kTokens;
        for (int64_t group = range.begin; group < range.end; group += kPassGroups) {
          on_tile(i, buffers, {0, 0}, {group, min_of(range.end, group + kPassGroups)});
        }
      });
    });
  }

  // The least of `count` parts of M * weights multiply-adds that a thread should take.
  int64_t grain(int64_t count, int64_t weights) const {
    return ceil_div(count, max_of(1, min_of(count, M * weights / kWorkPerThread)));
  }

  // Calls work(tile, range) for the parts [begin, end) of all tiles, each of which has `parts`.
  template <class Work>
  static void for_tiles(int64_t begin, int64_t end, int64_t parts, const Work& work) {
    while (begin < end) {
      const int64_t tile = begin / parts, last = min_of(end, (tile + 1) * parts);
      work(tile, Range{begin - tile * parts, last - tile * parts});
      begin = last;
    }
  }

  Buffers buffers_in(Scratch slot, bool with_hidden) const {
    Arena arena;
    const int64_t panel_at = arena.reserve<Acc>(kChunk<S> * kTokens);
    const int64_t sums_at = arena.reserve<Acc>(min_of(packed.groups, kPassGroups) * kGroup * kTokens);
    const int64_t hidden_at = arena.reserve<Acc>(with_hidden ? R * kTokens : 0);
    void* base = scratch(slot, arena.bytes);
    return {at_offset<Acc>(base, panel_at), at_offset<Acc>(base, sums_at), at_offset<Acc>(base, hidden_at)};
  }

  // Rows [rows.begin, rows.end) of the intermediate of a tile, and its columns of y that are rows of S in `groups`, for
  // which the intermediate must be whole.
  void on_tile(int64_t tile, const Buffers& buffers, Range rows, Range groups) const {
    const int64_t first = tile * vectors / tiles, last = (tile + 1) * vectors / tiles;
    choose(last - first, std::make_integer_sequence<int, kVecs>())(*this, first * kLanes, buffers, rows, groups);
  }

  using TileFn = void (*)(const SparseLinear&, int64_t token, const Buffers&, Range rows, Range groups);

  template <int... kV>
  static TileFn choose(int64_t vecs, std::integer_sequence<int, kV...>) {
    static constexpr TileFn kTiles[] = {of_vectors<kV + 1>...};
    return kTiles[vecs - 1];
  }

  template <int kV>
  static void of_vectors(const SparseLinear& op, int64_t token, const Buffers& buffers, Range rows, Range groups) {
    Tile<kV>{op, buffers, token, min_of(kV * kLanes, op.M - token)}.run(rows, groups);
  }

  // Tokens [token, token + tokens) in kV vectors.
  template <int kV>
  struct Tile {
    static constexpr int kStride = kV == 1 ? 1 : kVecs;
    static constexpr int kRow = kStride * S::kLanes;
    // The factors take two vectors at once.
    static constexpr int kWidth = kV == 1 ? 1 : 2;

    const SparseLinear& op;
    const Buffers& buffers;
    const int64_t token, tokens;

    void run(Range rows, Range groups) const {
      const Packed& packed = op.packed;
      for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) {
        fill_panel(chunk * packed.width, packed.features_of_chunk(chunk));
        multiply_down(chunk, rows);
        for (int64_t group = groups.begin; group < groups.end; ++group) {
          const bool last = chunk + 1 == packed.chunks;
          Acc* sums = buffers.sums + (group - groups.begin) * kGroup * kRow;
          if (!last) fetch_ahead((chunk + 1) * packed.width, group - groups.begin, groups.end - groups.begin);
          multiply_group(group, chunk, sums);
          if (last) {
            multiply_up(group, sums);
            store_group(group, sums);
          }
        }
      }
    }

    // The part of x that the next panel is made of comes into the L2 cache while groups are multiplied, some tokens
    // with each: short pieces of many rows are nothing that the processor fetches by itself.
    void fetch_ahead(int64_t feature, int64_t part, int64_t parts) const {
      if (op.p.x.col_stride != 1) return;
      const int64_t features = min_of(op.packed.width, op.K - feature);
      for (int64_t i = part * tokens / parts; i < (part + 1) * tokens / parts; ++i) {
        const T* at = element_of<T>(op.p.x, token + i, feature);
        for (int64_t k = 0; k < features; k += kLine / sizeof(T)) __builtin_prefetch(at + k, 0, 2);
      }
    }

    // panel[k][i] = x[token + i][feature + k], zero past the tokens and past the features.
    void fill_panel(int64_t feature, int64_t features) const {
      const MatrixView& x = op.p.x;
      for (int64_t i = 0; i < round_up(kV, kWidth) * kLanes; i += kLanes) {
        const int64_t valid = min_of(kLanes, max_of(0, tokens - i));
        for (int64_t k = 0; k < features; k += kLanes) {
          const int64_t count = min_of(kLanes, features - k);
          V rows[kLanes];
          for (int64_t row = 0; row < valid; ++row) {
            const T* at = element_of<T>(x, token + i + row, feature + k);
            if (count == kLanes && x.col_stride == 1) {
              rows[row] = S::load(at);
            } else {
              Acc wide[kLanes] = {};
              for (int64_t j = 0; j < count; ++j) wide[j] = widen(at[j * x.col_stride]);
              rows[row] = S::load(static_cast<const Acc*>(wide));
            }
          }
          for (int64_t row = valid; row < kLanes; ++row) rows[row] = S::zero();
          store_block_transposed<S>(rows, buffers.panel + k * kRow + i, kRow);
        }
      }
    }

    void multiply_group(int64_t group, int64_t chunk, Acc* sums) const {
      const Packed& packed = op.packed;
      const int64_t part = group * packed.chunks + chunk;
      const int64_t start = at_offset<int64_t>(op.weights, packed.starts_at)[part];
      multiply_entries<S, kV, kStride>(at_offset<SparseRow>(op.weights, packed.rows_at) + part * kGroup,
                                       packed.rows_of_group(group),
                                       at_offset<uint16_t>(op.weights, packed.places_at) + start,
                                       at_offset<Acc>(op.weights, packed.values_at) + start, buffers.panel, sums,
                                       chunk > 0);
    }

    // hidden[r] (+)= one chunk of row r of down times the panel.
    void multiply_down(int64_t chunk, Range rows) const {
      using Left = FixedRows<Acc, Packed::kDownRow>;
      const Acc* down = at_offset<Acc>(op.weights, op.packed.down_at) + chunk * op.R * Packed::kDownRow;
      multiply<Left>(rows.begin, rows.end, op.packed.features_of_chunk(chunk), buffers.panel, buffers.hidden, chunk > 0,
                     [&](int64_t r) { return Left{down + r * Packed::kDownRow}; });
    }

    // sums[n] += row n of up times hidden.
    void multiply_up(int64_t group, Acc* sums) const {
      using Left = FreeRows<Acc>;
      if (op.R == 0) return;
      const int64_t row = op.packed.up_row;
      const Acc* up = at_offset<Acc>(op.weights, op.packed.up_at) + group * kGroup * row;
      multiply<Left>(0, op.packed.rows_of_group(group), op.R, buffers.hidden, sums, true,
                     [&](int64_t n) { return Left{up + n * row, row}; });
    }

    // to[row] (+)= the row of `steps` weights that is left(row) times from[step].
    template <class Left, class At>
    static void multiply(int64_t begin, int64_t end, int64_t steps, const Acc* from, Acc* to, bool accumulate,
                         const At& left) {
      for (int64_t row = begin; row < end; row += S::kRows) {
        const auto multiply_rows = rows_tile<S, kWidth, kRow, Left, Acc, ToSums<S>>(min_of(S::kRows, end - row));
        for (int64_t j = 0; j < kV * kLanes; j += kWidth * kLanes) {
          multiply_rows(steps, left(row), from + j, {to + row * kRow + j, kRow, accumulate});
        }
      }
    }

    // y[token + i][n] = sums[n][i] + bias[n], rounded.
    void store_group(int64_t group, const Acc* sums) const {
      const int64_t rows = op.packed.rows_of_group(group), N = op.N;
      const T* bias = static_cast<const T*>(op.p.bias);
      T* y = static_cast<T*>(op.p.y) + token * N + group * kGroup;
      for (int64_t n = 0; n < rows; n += kLanes) {
        const int64_t cols = min_of(kLanes, rows - n);
        Acc added[kLanes] = {};
        for (int64_t j = 0; bias && j < cols; ++j) added[j] = widen(bias[(group * kGroup + n + j) * op.p.bias_stride]);
        const V to_add = S::load(static_cast<const Acc*>(added));
        for (int64_t i = 0; i < tokens; i += kLanes) {
          V columns[kLanes];
          for (int64_t j = 0; j < kLanes; ++j) columns[j] = j < cols ? S::load(sums + (n + j) * kRow + i) : S::zero();
          alignas(kLine) Acc block[kLanes * kLanes];
          store_block_transposed<S>(columns, block, kLanes);
          for (int64_t row = 0; row < min_of(kLanes, tokens - i); ++row) {
            T* out = y + (i + row) * N + n;
            const V sum = S::add(S::load(static_cast<const Acc*>(block + row * kLanes)), to_add);
            if (cols == kLanes) {
              S::store(out, sum);
            } else {
              S::store(block, sum);
              for (int64_t j = 0; j < cols; ++j) narrow(block[j], out + j);
            }
          }
        }
      }
    }
  };
};

// Calls work(SparseLinear<S, T>*) for the dtype of the tensors.
template <class Work>
auto with_sparse_kernel(Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::kFloat64:
      return work(static_cast<SparseLinear<F64, double>*>(nullptr));
    case Dtype::kBFloat16:
      return work(static_cast<SparseLinear<F32, BFloat>*>(nullptr));
    case Dtype::kFloat16:
      return work(static_cast<SparseLinear<F32, Half>*>(nullptr));
    default:
      return work(static_cast<SparseLinear<F32, float>*>(nullptr));
  }
}

inline void sparse_linear_kernel(const SparseLinearParams& params) {
  with_sparse_kernel(params.dtype, [&](auto* op) { op->entry(params); });
}

// The bytes of packed weights; writes them where `to` is not null.
inline int64_t sparse_pack_kernel(const SparseLinearParams& params, void* to) {
  return with_sparse_kernel(params.dtype, [&](auto* op) {
    const typename std::remove_pointer_t<decltype(op)>::Packed packed{params};
    if (to) packed.pack(to);
    return packed.bytes;
  });
}

}  // namespace
}  // namespace mixrank
