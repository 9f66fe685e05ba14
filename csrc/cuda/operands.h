// Operands of mma.sync: read from tiles in shared memory, and split into terms of 16 bits where they are wider.
//
// A tile has rows of 128 bytes, swizzled as in tiles.h: 64 elements of 16 bits or 32 floats, which is kDepth. A step is 16 terms. An
// fp32 value is the sum of its first `Terms` bf16 terms: 2 keep 16 bits of it, 3 keep all 24. Which of the 16 terms a thread holds
// is free as long as both operands agree, so four floats that are adjacent serve as terms 2t, 2t+1, 2t+8, 2t+9.
#pragma once

#include <string.h>

#include "cuda/device.h"
#include "cuda/tiles.h"

namespace mixrank {

MIXRANK_DEVICE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

MIXRANK_DEVICE float low_bf16(uint32_t pair) { return float_of_bits(pair << 16); }
MIXRANK_DEVICE float high_bf16(uint32_t pair) { return float_of_bits(pair & 0xFFFF0000u); }

// What is left of a value above its bf16 term; nothing of an infinite one, as inf - inf would be NaN.
MIXRANK_DEVICE float rest(float value, float term) {
  return (term - term) == 0.0f || term != term ? value - term : 0.0f;
}

// A pair of bf16 values, but zero for the infinite ones.
MIXRANK_DEVICE uint32_t finite_bf16(uint32_t pair) {
  if ((pair & 0x7FFFu) == 0x7F80u) pair &= 0xFFFF0000u;
  if ((pair & 0x7FFF0000u) == 0x7F800000u) pair &= 0xFFFFu;
  return pair;
}

// An operand in parts: its terms, and where the other operand has several terms (OtherTerms), one part more: the first term, which is
// what the other's lesser terms are multiplied with, without infinite values. Infinity times a term that happens to be zero is NaN,
// where infinity times the whole value is not.
template <int Terms, int OtherTerms>
constexpr int kPartsOf = Terms + (OtherTerms > 1 ? 1 : 0);

// The parts of two values, in pairs.
template <int Terms, int Parts>
MIXRANK_DEVICE void split(float low, float high, uint32_t (&pairs)[Parts]) {
  static_assert(Parts == Terms || Parts == Terms + 1);
#pragma unroll
  for (int i = 0; i < Terms; ++i) {
    pairs[i] = pack_bf16(low, high);
    if (i + 1 < Terms) {
      low = rest(low, low_bf16(pairs[i]));
      high = rest(high, high_bf16(pairs[i]));
    }
  }
  if constexpr (Parts > Terms) pairs[Terms] = finite_bf16(pairs[0]);
}

// Elements of 16 bits, as they are.
struct BFloat16 {
  using Element = uint16_t;
  static constexpr bool kIsBFloat16 = true;
  static constexpr int kTerms = 1, kParts = 1;
  static constexpr int kDepth = 64;

  MIXRANK_DEVICE static void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_bf16(sum, a, b[0], b[1]);
  }
  MIXRANK_DEVICE static uint16_t narrow(float value) { return static_cast<uint16_t>(pack_bf16(value, 0.0f)); }
  MIXRANK_DEVICE static uint32_t narrow(float low, float high) { return pack_bf16(low, high); }
  MIXRANK_DEVICE static float widen(uint16_t bits) { return low_bf16(bits); }
};

struct Float16 {
  using Element = uint16_t;
  static constexpr bool kIsBFloat16 = false;
  static constexpr int kTerms = 1, kParts = 1;

  MIXRANK_DEVICE static void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_fp16(sum, a, b[0], b[1]);
  }
  MIXRANK_DEVICE static float widen(uint16_t bits) { return widen_fp16(bits); }
};

// fp32 as `Terms` bf16 terms; of the products of terms those are left out that are smaller than what is left of the operands.
template <int Terms>
struct Float32 {
  using Element = float;
  static constexpr int kTerms = Terms, kParts = kPartsOf<Terms, Terms>;
  static constexpr int kDepth = 32;

  MIXRANK_DEVICE static void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_bf16(sum, a, b[0], b[1]);
  }
  MIXRANK_DEVICE static float narrow(float value) { return value; }
  MIXRANK_DEVICE static float widen(float value) { return value; }
};

// sum += a b over all pairs of terms that count, the smallest first. Where both have several terms the products are summed by
// themselves first: tensor cores cut off what falls below their sum, which would show in many small steps of a long one.
template <class Operand, int TermsA, int TermsB>
MIXRANK_DEVICE void multiply_terms(float (&sum)[4], const uint32_t (&a)[kPartsOf<TermsA, TermsB>][4],
                                   const uint32_t (&b)[kPartsOf<TermsB, TermsA>][2]) {
  if constexpr (TermsA == 1 && TermsB == 1) {
    Operand::multiply(sum, a[0], b[0]);
  } else {
    constexpr int kMost = TermsA > TermsB ? TermsA : TermsB;
    float step[4] = {};
#pragma unroll
    for (int order = kMost - 1; order >= 0; --order) {
#pragma unroll
      for (int i = 0; i < TermsA; ++i) {
        const int j = order - i;
        if (j < 0 || j >= TermsB) continue;
        Operand::multiply(step, a[i == 0 && j > 0 ? TermsA : i], b[j == 0 && i > 0 ? TermsB : j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += step[i];
  }
}

// The four floats of step `step` that a thread holds of a row, as parts of the first and the last two.
template <class Operand>
MIXRANK_DEVICE void load_floats(uint32_t (&first)[Operand::kParts], uint32_t (&last)[Operand::kParts], const char* tile,
                                int row, int step, int lane) {
  float v[4];
  memcpy(v, tile + box_offset(row, (lane % 4 * 2 + step) * 8), sizeof(v));
  split<Operand::kTerms>(v[0], v[1], first);
  split<Operand::kTerms>(v[2], v[3], last);
}

// Step `step` of 16 rows of a tile of adjacent terms, as the left operand.
template <class Operand>
MIXRANK_DEVICE void load_left(uint32_t (&a)[Operand::kParts][4], const char* tile, int row, int step, int lane) {
  if constexpr (sizeof(typename Operand::Element) == 2) {
    load_matrices(a[0], tile + box_offset(row + lane % 16, step * 16 + lane / 16 * 8));
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t first[Operand::kParts], last[Operand::kParts];
      load_floats<Operand>(first, last, tile, row + half * 8 + lane / 4, step, lane);
#pragma unroll
      for (int i = 0; i < Operand::kParts; ++i) {
        a[i][half] = first[i];
        a[i][half + 2] = last[i];
      }
    }
  }
}

// The same as two right operands of 8 rows each.
template <class Operand>
MIXRANK_DEVICE void load_right(uint32_t (&b)[2][Operand::kParts][2], const char* tile, int row, int step, int lane) {
  if constexpr (sizeof(typename Operand::Element) == 2) {
    uint32_t r[4];
    load_matrices(r, tile + box_offset(row + lane / 16 * 8 + lane % 8, step * 16 + lane / 8 % 2 * 8));
    b[0][0][0] = r[0], b[0][0][1] = r[1], b[1][0][0] = r[2], b[1][0][1] = r[3];
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t first[Operand::kParts], last[Operand::kParts];
      load_floats<Operand>(first, last, tile, row + half * 8 + lane / 4, step, lane);
#pragma unroll
      for (int i = 0; i < Operand::kParts; ++i) {
        b[half][i][0] = first[i];
        b[half][i][1] = last[i];
      }
    }
  }
}

// `valid` bytes at `from`, of `bytes`, into a tile at unit `unit` of row `row`, the rest zeros; at most `access` bytes at a time.
// Copies of 4 and more bytes are on their way until copy_wait.
MIXRANK_DEVICE void copy_unit(char* to, const char* from, int valid, int access) {
  valid = valid < 0 ? 0 : valid > 16 ? 16 : valid;
  if (access == 16) {
    copy_async<16>(to, from, valid);
  } else if (access == 4) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      const int left = valid - i < 0 ? 0 : valid - i > 4 ? 4 : valid - i;
      copy_async<4>(to + i, left > 0 ? from + i : from, left);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      uint16_t bits = 0;
      if (i < valid) memcpy(&bits, from + i, 2);
      memcpy(to + i, &bits, 2);
    }
  }
}

}  // namespace mixrank
