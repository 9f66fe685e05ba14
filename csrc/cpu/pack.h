// From tensors of any dtype and strides to the units that the tiles read, zero-padded to whole tiles.
// Included once by each file of kernels, after its target is set.
#pragma once

namespace mixrank {
namespace {

template <class T>
inline const T* row_of(const MatrixView& view, int64_t row) {
  return static_cast<const T*>(view.data) + (view.row_offsets ? view.row_offsets[row] : row * view.row_stride);
}

template <class T>
inline const T* element_of(const MatrixView& view, int64_t row, int64_t col) {
  return row_of<T>(view, row) + col * view.col_stride;
}

// dst[i] = src[i * stride] in the accumulator's type.
template <class S, class T>
inline void widen_row(const T* src, int64_t stride, int64_t count, typename S::Acc* dst) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + S::kLanes <= count; i += S::kLanes) S::store(dst + i, S::load(src + i));
  }
  for (; i < count; ++i) dst[i] = widen(src[i * stride]);
}

template <class T>
inline void copy_row(const T* src, int64_t stride, int64_t count, T* dst) {
  if (stride == 1) {
    memcpy(dst, src, count * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) dst[i] = src[i * stride];
  }
}

// The units of `count` elements that lie `stride` apart.
template <class S, class T>
inline void unit_row(const T* src, int64_t stride, int64_t count, typename S::Unit* dst) {
  if constexpr (S::kPack == 1) {
    widen_row<S>(src, stride, count, dst);
  } else {
    static_assert(sizeof(T) * S::kPack == sizeof(typename S::Unit), "a unit holds kPack elements");
    T* elements = reinterpret_cast<T*>(dst);
    copy_row(src, stride, count, elements);
    for (int64_t i = count; i % S::kPack != 0; ++i) elements[i] = T{};
  }
}

// Rows [row, row + rows) of x, rows <= kRows, as ceil(units / kInner) row blocks (microkernel.h) one after another.
template <class S, class T>
inline void pack_rows(const MatrixView& x, int64_t row, int64_t rows, typename S::Unit* dst) {
  constexpr int64_t kElements = kInner * S::kPack;
  for (int64_t first = 0; first < x.cols; first += kElements, dst += kRowBlockSize<S>) {
    const int64_t count = min_of(kElements, x.cols - first);
    for (int64_t i = 0; i < rows; ++i) {
      unit_row<S>(element_of<T>(x, row + i, first), x.col_stride, count, dst + i * kRowStride<S>);
    }
  }
}

// Fetches rows of x into the L2 cache, some lines of them with each tile, so that packing them later does not wait.
template <class T>
struct RowsAhead {
  const MatrixView& x;
  int64_t row, end;
  int64_t share;  // cache lines at a time
  int64_t column = 0;

  void fetch() {
    for (int64_t n = 0; n < share && row < end; ++n) {
      __builtin_prefetch(row_of<T>(x, row) + column, 0, 2);
      column += kLine / sizeof(T);
      if (column >= x.cols) column = 0, ++row;
    }
  }
};

// What the right operand of a product is stored in: 16-bit weights stay as they are where widening is one instruction.
template <class S, class T, bool kSixteenBit = sizeof(T) == 2 && S::kPack == 1 && S::kWidensFast>
struct StoredAs {
  using Type = typename S::Unit;
};
template <class S, class T>
struct StoredAs<S, T, true> {
  using Type = T;
};
template <class S, class T>
using Stored = typename StoredAs<S, T>::Type;

// dst[u * width + n] = unit u of row n, for `width` rows (whole vectors) that lie src_row apart.
template <class S, class T>
inline void transpose_units(const T* src, int64_t src_row, int64_t elements, int64_t width, Stored<S, T>* dst) {
  using W = Stored<S, T>;
  int64_t k = 0;
  if constexpr (sizeof(typename S::Unit) == 4) {
    constexpr int64_t kStep = S::kLanes * S::kPack;
    for (; k + kStep <= elements; k += kStep) {
      for (int64_t n = 0; n < width; n += S::kLanes) {
        decltype(F32::zero()) rows[S::kLanes];
        for (int i = 0; i < S::kLanes; ++i) {
          const auto units = S::load(src + (n + i) * src_row + k);
          memcpy(&rows[i], &units, sizeof(units));
        }
        W* out = dst + (k / S::kPack) * width + n;
        if constexpr (sizeof(W) == 4) {
          store_transposed(rows, reinterpret_cast<float*>(out), width);
        } else {
          alignas(64) float wide[S::kLanes * S::kLanes];
          store_transposed(rows, wide, S::kLanes);
          for (int i = 0; i < S::kLanes; ++i) S::store(out + i * width, S::load(wide + i * S::kLanes));
        }
      }
    }
  }
  for (int64_t n = 0; n < width; ++n) {
    const T* row = src + n * src_row;
    if constexpr (S::kPack == 1) {
      for (int64_t i = k; i < elements; ++i) narrow(widen(row[i]), dst + i * width + n);
    } else {
      for (int64_t i = k; i < elements; i += S::kPack) {
        T unit[S::kPack] = {};
        for (int64_t e = 0; e < min_of(S::kPack, elements - i); ++e) unit[e] = row[i + e];
        memcpy(dst + (i / S::kPack) * width + n, unit, sizeof(unit));
      }
    }
  }
}

// Two weights as one: below each other ([R, K] and [Q, K]) or side by side ([N, R] and [N, Q]).
struct JoinedView {
  const MatrixView* parts;
  bool below;

  int64_t rows() const { return parts[0].rows + (below ? parts[1].rows : 0); }
  int64_t cols() const { return parts[0].cols + (below ? 0 : parts[1].cols); }

  template <class T>
  void copy_row_to(int64_t row, T* dst) const {
    if (below) {
      const MatrixView& part = row < parts[0].rows ? parts[0] : parts[1];
      copy_row(row_of<T>(part, row < parts[0].rows ? row : row - parts[0].rows), part.col_stride, part.cols, dst);
      return;
    }
    copy_row(row_of<T>(parts[0], row), parts[0].col_stride, parts[0].cols, dst);
    if (parts[1].cols > 0) copy_row(row_of<T>(parts[1], row), parts[1].col_stride, parts[1].cols, dst + parts[0].cols);
  }
};

// Rows [row, row + kTileCols) of a weight as one panel: dst[u][n], u in units of the columns; missing rows are zero.
template <class S, class T>
inline void pack_panel(const JoinedView& weight, int64_t row, Stored<S, T>* dst) {
  constexpr int64_t kCols = kTileCols<S>;
  const MatrixView& first = weight.parts[0];
  const int64_t valid = min_of(kCols, weight.rows() - row), cols = weight.cols();
  const bool alone = row + kCols <= first.rows && cols == first.cols;
  if (alone && first.col_stride == 1) {
    transpose_units<S>(row_of<T>(first, row), first.row_stride, cols, kCols, dst);
    return;
  }
  if constexpr (S::kPack == 1) {
    if (alone && first.row_stride == 1) {  // a transposed weight: its columns are rows of the panel
      for (int64_t k = 0; k < cols; ++k) {
        const T* column = element_of<T>(first, row, k);
        for (int64_t n = 0; n < kCols; n += S::kLanes) S::store(dst + k * kCols + n, S::load(column + n));
      }
      return;
    }
  }
  T* rows = static_cast<T*>(scratch(Scratch::kRows, kCols * cols * sizeof(T)));
  for (int64_t n = 0; n < valid; ++n) weight.copy_row_to<T>(row + n, rows + n * cols);
  memset(rows + valid * cols, 0, (kCols - valid) * cols * sizeof(T));
  transpose_units<S>(rows, cols, cols, kCols, dst);
}

// Work on disjoint ranges, each with a plain function pointer across the border to the threads.
template <class F>
inline void parallel(int64_t count, int64_t grain, const F& work) {
  parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&work));
}

// Cuts one piece of memory into arrays that each start on a cache line.
struct Arena {
  int64_t bytes = 0;

  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t offset = bytes;
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return offset;
  }
};

template <class T>
inline T* at_offset(void* base, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

template <class T>
inline const T* at_offset(const void* base, int64_t offset) {
  return reinterpret_cast<const T*>(static_cast<const char*>(base) + offset);
}

}  // namespace
}  // namespace mixrank
