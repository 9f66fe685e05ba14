// Linear layers of 8-bit weights on raw pointers: y = x @ W^T + bias, or y = (x @ D^T) @ U^T + bias, where each weight
// is codes times a scale for each of its rows. Also the packing of the codes, which a caller may keep.
//
// Shapes: x [M, K], weight[0] [N, K] with one weight; [R, K] and weight[1] [N, R] with two; scale one for each row of
//   its weight, bias [N], y [M, N]; all sizes but M at least 1, K and R at most kMostTerms. With `index` [N] the layer
//   is pivoted: weight[1] is [N - R, R], y[index[r]] is the intermediate's column r, and y[index[R + c]] column c of
//   the second product; index is a permutation of 0 .. N - 1, checked by the caller.
// Layout: x of any strides; codes, scales and y contiguous; y overlaps no input. x, bias and y have one dtype (fp32,
//   bf16, fp16), scales are fp32.
// Numbers: see docs/kernels/int8.md. With `dynamic`, rows of x and of the intermediate are quantised to 8 bits, products
//   are exact sums in int32; the codes and those sums are the same on every instruction set. Otherwise the arithmetic
//   is that of fp32 operands in lowrank_linear.h on widened codes, whose scales are applied to the sums.
// Memory: no ownership is taken; scratch belongs to the calling threads (runtime.h).
#pragma once

#include "cpu/types.h"

namespace mixrank {

// 255 * 128 times this fits into int32.
constexpr int64_t kMostTerms = 65536;

struct Int8Weight {
  const int8_t* codes;  // [rows, cols]
  const float* scale;   // [rows]
  int64_t rows;
  int64_t cols;
};

struct Int8LinearParams {
  Dtype dtype;
  bool dynamic;
  int32_t count;  // of weights: 1 or 2
  MatrixView x;
  Int8Weight weight[2];
  const void* bias;  // [N] or null
  int64_t bias_stride;
  const int64_t* index;  // [N] or null
  const void* packed;    // what int8_pack wrote for the same codes and `dynamic`, aligned to 64 bytes, or null
  uint64_t sample;       // goes into the header
  void* y;
};

constexpr char kPackedInt8Magic[8] = {'m', 'i', 'x', 'r', 'a', 'n', 'k', '8'};

// What packed codes begin with: whoever takes them checks that they are meant for this kernel and these codes.
struct PackedInt8Header {
  char magic[8];
  int32_t isa;  // KernelTable::isa_id
  int32_t dynamic;
  int32_t count;
  int32_t unused;
  int64_t rows[2], cols[2];
  uint64_t sample;  // of the codes, see int8_linear_op.cpp
};
static_assert(sizeof(PackedInt8Header) == 64, "the panels behind it start on a cache line");

}  // namespace mixrank
