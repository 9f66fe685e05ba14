// y = x @ S^T + (x @ down^T) @ up^T + bias on raw pointers, S sparse without structure; the terms with down and bias
// may be absent. Also the packing of the weights, which a caller may keep.
//
// Shapes: x [M, K], S [N, K], down [R, K], up [N, R], bias [N], y [M, N], all of one dtype; K, N >= 1, M, R >= 0. An
//   entry (n, k) of S is stored where bit k % 8 of mask[n][k / 8] is set; values holds the stored ones row by row, k
//   rising. Instead, values, down and up may all be codes of 8 bits, each times the scale of its row.
// Layout: x and the factors of any strides and any alignment of their own dtype; mask, values and y contiguous; mask
//   has as many bits as there are values and none beyond K, which the caller checks; y overlaps no input.
// Precision: a code times its scale is rounded to fp32; products are accumulated in fp32 (fp64 for fp64), at most kChunk
//   terms of S or kBlock terms of a factor in one running sum; the intermediate stays in that precision, and y is
//   rounded once, to nearest even. Entries that are not stored are not multiplied: what is not finite in x reaches the
//   rows alone that have an entry for it.
// Order: the sum behind an element of y depends on the shapes, on S, on the instruction set and, with a few tokens of x
//   and few entries of S, on whether the weights are packed; not on the threads.
// Memory: no ownership is taken; scratch belongs to the calling threads (runtime.h).
#pragma once

#include "cpu/types.h"

namespace mixrank {

struct SparseLinearParams {
  Dtype dtype;
  MatrixView x;             // [M, K]
  int64_t N;
  int64_t count;            // of values
  const uint8_t* mask;      // [N, ceil(K / 8)]
  const void* values;       // [count]
  const float* scale;       // [N] of codes of 8 bits, or null
  MatrixView down;          // [R, K]; no rows: there is no such branch
  MatrixView up;            // [N, R]
  const float* down_scale;  // [R], with `scale` alone
  const float* up_scale;    // [N]
  const void* bias;         // [N] or null
  int64_t bias_stride;
  const void* packed;       // what sparse_pack wrote for the same weights, aligned to 64 bytes, or null
  uint64_t sample;          // goes into the header
  void* y;                  // [M, N]
};

constexpr char kPackedSparseMagic[8] = {'m', 'i', 'x', 'r', 'a', 'n', 'k', 's'};

// What packed weights begin with: whoever takes them checks that they are meant for this kernel and these weights.
struct PackedSparseHeader {
  char magic[8];
  int32_t isa;  // KernelTable::isa_id
  Dtype dtype;
  int64_t mask_row, N, R, count;
  uint64_t sample;   // of the weights, see weight_sample.h
  int64_t is_codes;  // whether they are codes of 8 bits; dtype is then that of the entries they became
  int64_t unused[8];
};
static_assert(sizeof(PackedSparseHeader) == 128, "what lies behind it starts on a cache line");

}  // namespace mixrank
