// Results in registers to rows in memory.
#pragma once

#include "cuda/operands.h"
#include "cuda/params.h"

namespace mixrank {

MIXRANK_DEVICE uint32_t exchange(uint32_t value, int lanes) { return __shfl_xor_sync(0xFFFFFFFFu, value, lanes); }

// The four threads of a row hold two columns of each of four results; after this, thread t holds the eight columns of result t.
MIXRANK_DEVICE void gather_columns(uint32_t (&pairs)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = exchange(odd ? pairs[i] : pairs[i + 1], 1);
    (odd ? pairs[i] : pairs[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = exchange(upper ? pairs[i] : pairs[i + 2], 2);
    (upper ? pairs[i] : pairs[i + 2]) = got;
  }
}

// c = sum + bias for 16 rows from `row` on and 8 * ColTiles columns from `col` on, as far as they are within M x N. By all threads
// of a warp.
template <class Operand, int ColTiles>
MIXRANK_DEVICE void store_rows(const float (&sum)[ColTiles][4], const ProductParams::Output& output, const void* bias,
                               int64_t row, int col, int64_t M, int lane) {
  using Element = typename Operand::Element;
  const auto* biases = static_cast<const Element*>(bias);
  const auto bias_at = [&](int n) { return biases != nullptr && n < output.N ? Operand::widen(biases[n]) : 0.0f; };
  if constexpr (sizeof(Element) == 2 && ColTiles % 4 == 0) {
#pragma unroll
    for (int first = 0; first < ColTiles; first += 4) {
      float low[4], high[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[i] = bias_at(col + (first + i) * 8 + lane % 4 * 2);
        high[i] = bias_at(col + (first + i) * 8 + lane % 4 * 2 + 1);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pairs[i] = Operand::narrow(sum[first + i][half * 2] + low[i], sum[first + i][half * 2 + 1] + high[i]);
        }
        gather_columns(pairs, lane);
        const int64_t m = row + half * 8 + lane / 4;
        const int n = col + (first + lane % 4) * 8;
        if (m >= M) continue;
        Element* c = static_cast<Element*>(output.c) + m * output.stride + n;
        if (output.aligned && n + 8 <= output.N) {
          *reinterpret_cast<uint4*>(c) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
          continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (n + i < output.N) c[i] = static_cast<Element>(pairs[i / 2] >> (i % 2 * 16));
        }
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < ColTiles; ++i) {
      const int n = col + i * 8 + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = row + half * 8 + lane / 4;
        if (m >= M) continue;
        Element* c = static_cast<Element*>(output.c) + m * output.stride + n;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (n + j < output.N) c[j] = Operand::narrow(sum[i][half * 2 + j] + bias_at(n + j));
        }
      }
    }
  }
}

}  // namespace mixrank
