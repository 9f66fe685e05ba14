// From tensors of any dtype and strides to the units that the tiles read, zero-padded to whole tiles.
// Included once by each file of kernels, after its target is set.
#pragma once

namespace mixrank {
namespace {

template <class T>
inline const T* row_of(const MatrixView& view, int64_t row) {
  return static_cast<const T*>(view.data) + (view.row_offsets ? view.row_offsets[row] : row * view.row_stride);
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

// The units of `count` elements that lie `stride` apart.
template <class S, class T>
inline void unit_row(const T* src, int64_t stride, int64_t count, typename S::Unit* dst) {
  if constexpr (S::kPack == 1) {
    widen_row<S>(src, stride, count, dst);
  } else {
    static_assert(sizeof(T) * S::kPack == sizeof(typename S::Unit), "a unit holds kPack elements");
    T* elements = reinterpret_cast<T*>(dst);
    if (stride == 1) {
      memcpy(elements, src, count * sizeof(T));
    } else {
      for (int64_t i = 0; i < count; ++i) elements[i] = src[i * stride];
    }
    for (int64_t i = count; i % S::kPack != 0; ++i) elements[i] = T{};
  }
}

// kRows rows of x, elements [first, first + count), as one row block (microkernel.h). Rows that the tile computes
// beyond the valid ones are zero.
template <class S, class T>
inline void pack_row_block(const MatrixView& x, int64_t row, int64_t rows, int64_t first, int64_t count,
                           typename S::Unit* dst) {
  for (int64_t i = 0; i < rows; ++i) {
    unit_row<S>(row_of<T>(x, row + i) + first * x.col_stride, x.col_stride, count, dst + i * kRowStride<S>);
  }
  for (int64_t i = rows; i < tile_rows<S>(rows); ++i) {
    memset(dst + i * kRowStride<S>, 0, ceil_div(count, S::kPack) * sizeof(typename S::Unit));
  }
}

// 32-bit units can go through registers; fp64 has no transposition of its own and takes the loop.
template <class S, class T>
inline int64_t pack_transposed(const T* src, int64_t src_row, int64_t count, typename S::Unit* dst) {
  if constexpr (sizeof(typename S::Unit) == 4) {
    constexpr int64_t kStep = S::kLanes * S::kPack;
    int64_t k = 0;
    for (; k + kStep <= count; k += kStep) {
      for (int64_t n = 0; n < kTileCols<S>; n += S::kLanes) {
        decltype(F32::zero()) rows[S::kLanes];
        for (int i = 0; i < S::kLanes; ++i) {
          const auto units = S::load(src + (n + i) * src_row + k);
          memcpy(&rows[i], &units, sizeof(units));
        }
        store_transposed(rows, reinterpret_cast<float*>(dst) + (k / S::kPack) * kTileCols<S> + n, kTileCols<S>);
      }
    }
    return k;
  }
  return 0;
}

// Rows [row, row + kTileCols) of a weight [N, K] as one panel: dst[k][n], k in units.
template <class S, class T>
inline void pack_panel(const MatrixView& weight, int64_t row, typename S::Unit* dst) {
  constexpr int64_t kCols = kTileCols<S>;
  const int64_t valid = min_of(kCols, weight.rows - row);
  const int64_t units = ceil_div(weight.cols, S::kPack);
  const T* src = row_of<T>(weight, row);
  int64_t k = 0;
  if (valid < kCols) {
    memset(dst, 0, units * kCols * sizeof(typename S::Unit));
  } else if (weight.col_stride == 1) {
    k = pack_transposed<S>(src, weight.row_stride, weight.cols, dst);
  }
  if (S::kPack == 1 && weight.row_stride == 1) {
    for (; k < weight.cols; ++k) unit_row<S>(src + k * weight.col_stride, 1, valid, dst + k * kCols);
    return;
  }
  for (int64_t n = 0; n < valid; ++n) {
    const T* from = src + n * weight.row_stride;
    if constexpr (S::kPack == 1) {
      for (int64_t i = k; i < weight.cols; ++i) dst[i * kCols + n] = widen(from[i * weight.col_stride]);
    } else {
      for (int64_t u = k / S::kPack; u < units; ++u) {
        T* unit = reinterpret_cast<T*>(dst + u * kCols + n);
        for (int64_t e = 0; e < S::kPack; ++e) {
          const int64_t i = u * S::kPack + e;  // the last unit may be half empty
          unit[e] = i < weight.cols ? from[i * weight.col_stride] : T{};
        }
      }
    }
  }
}

// Work on disjoint ranges, each with a plain function pointer across the border to the threads.
template <class F>
inline void parallel(int64_t count, int64_t grain, const F& work) {
  parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&work));
}

// Cuts one piece of scratch into arrays that each start on a cache line.
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

}  // namespace
}  // namespace mixrank
