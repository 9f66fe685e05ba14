// The block-sparse term of a product, added to sums in registers: x and the blocks are read where they are, once for every 16
// columns of the output. Sums are held as by mma.sync and wgmma.
#pragma once

#include "cuda/operands.h"
#include "cuda/params.h"

namespace mixrank {

MIXRANK_DEVICE int64_t index_at(const void* indices, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

// Four adjacent elements as two pairs of terms.
template <class Operand>
MIXRANK_DEVICE void load_four(const typename Operand::Element* from, bool aligned, uint32_t (&first)[Operand::kParts],
                              uint32_t (&last)[Operand::kParts]) {
  typename Operand::Element v[4];
  if (aligned) {
    if constexpr (sizeof(v) == 8) {
      const uint2 read = *reinterpret_cast<const uint2*>(from);
      memcpy(v, &read, sizeof(v));
    } else {
      const uint4 read = *reinterpret_cast<const uint4*>(from);
      memcpy(v, &read, sizeof(v));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = from[i];
  }
  if constexpr (sizeof(v) == 8) {
    first[0] = v[0] | static_cast<uint32_t>(v[1]) << 16;
    last[0] = v[2] | static_cast<uint32_t>(v[3]) << 16;
  } else {
    split<Operand::kTerms>(v[0], v[1], first);
    split<Operand::kTerms>(v[2], v[3], last);
  }
}

// sum += x S^T for the 16 * RowTiles rows from `row` on and the 8 * ColTiles columns from `col` on.
template <class Operand, int RowTiles, int ColTiles>
MIXRANK_DEVICE void add_sparse(float (&sum)[RowTiles][ColTiles][4], const SparseTerm& term, int64_t row, int col,
                               int64_t M, int N, int lane) {
  using Element = typename Operand::Element;
  static_assert(ColTiles % 2 == 0);
  constexpr int kParts = Operand::kParts;
  const auto* x = static_cast<const Element*>(term.x);
  const int64_t size = term.size;
#pragma unroll
  for (int pair = 0; pair < ColTiles / 2; ++pair) {
    const int n = col + pair * 16;
    if (n >= N) continue;
    const int64_t first = index_at(term.crow, term.wide_indices, n / size);
    const int64_t last = index_at(term.crow, term.wide_indices, n / size + 1);
    for (int64_t e = first; e < last; ++e) {
      const int64_t k = index_at(term.col, term.wide_indices, e) * size;
      const Element* values = static_cast<const Element*>(term.values) + (e * size + n % size) * size;
      for (int step = 0; step < size; step += 16) {
        uint32_t b[2][kParts][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t low[kParts], high[kParts];
          load_four<Operand>(values + (half * 8 + lane / 4) * size + step + lane % 4 * 4, term.aligned, low, high);
#pragma unroll
          for (int i = 0; i < kParts; ++i) b[half][i][0] = low[i], b[half][i][1] = high[i];
        }
#pragma unroll
        for (int tile = 0; tile < RowTiles; ++tile) {
          uint32_t a[kParts][4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t m = row + tile * 16 + half * 8 + lane / 4;
            uint32_t low[kParts] = {}, high[kParts] = {};
            if (m < M) load_four<Operand>(x + m * term.x_stride + k + step + lane % 4 * 4, term.aligned, low, high);
#pragma unroll
            for (int i = 0; i < kParts; ++i) a[i][half] = low[i], a[i][half + 2] = high[i];
          }
          multiply_terms<Operand, Operand::kTerms, Operand::kTerms>(sum[tile][pair * 2], a, b[0]);
          multiply_terms<Operand, Operand::kTerms, Operand::kTerms>(sum[tile][pair * 2 + 1], a, b[1]);
        }
      }
    }
  }
}

}  // namespace mixrank
