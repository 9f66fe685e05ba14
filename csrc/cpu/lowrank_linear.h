// y = (x @ down^T) @ up^T + (x @ down2^T) @ up2^T + x @ S^T + bias on raw pointers; the terms with down2, S and bias
// may be absent. Also the packing of the factors, which a caller may keep.
// With an index, y[:, index[:R]] = x @ down^T and y[:, index[R:]] = (x @ down^T) @ up^T, plus bias: up is [N - R, R].
//
// Shapes: x [M, K], down [R, K], up [N, R], down2 [Q, K], up2 [N, Q], bias [N], y [M, N], all of one dtype;
//   K, N, R >= 1, M, Q >= 0. S [N, K] is block-sparse: block row i holds the blocks crow[i] .. crow[i + 1], block e
//   lies at block column col[e] and is values[e] [b, b] with b = 16 or 32, a divisor of N and K. index [N] holds
//   0 .. N - 1, rising in its first R entries and in the others; with it there are no down2, up2 and S.
// Layout: x and the factors of any strides and any alignment of their own dtype; values and y contiguous; crow and
//   col checked by the caller; y overlaps no input.
// Precision: products are accumulated in fp32 (fp64 for fp64), at most kBlock terms in one running sum, all terms of
//   an element of y in one accumulator, and y is rounded once, to nearest even. The intermediates stay in that
//   precision too, except with vdpbf16ps (bf16 on avx512bf16): there they are rounded once to bf16, as two bf16 linear
//   layers do, because fp32 would halve the speed of the second product. With vdpbf16ps subnormal inputs and partial
//   sums count as zero.
// Order: the sum behind an element of y depends on the shapes and on the instruction set, not on the threads.
// Memory: no ownership is taken; scratch belongs to the calling threads (runtime.h).
#pragma once

#include "cpu/types.h"

namespace mixrank {

struct BlockSparse {
  int64_t size;  // b; 0: there is no such residual
  int64_t count;
  const int64_t* crow;  // [N / b + 1]
  const int64_t* col;   // [count]
  const void* values;   // [count, b, b]
};

struct LowrankLinearParams {
  Dtype dtype;
  MatrixView x;        // [M, K]
  MatrixView down[2];  // [R, K], [Q, K]
  MatrixView up[2];    // [N, R], [N, Q]
  BlockSparse blocks;
  const int64_t* index;  // [N] or null; not read where `packed` is given
  bool pivoted;          // whether there is an index
  const void* bias;      // [N] or null
  int64_t bias_stride;
  const void* packed;  // what lowrank_pack wrote for the same factors, aligned to 64 bytes, or null
  uint64_t sample;     // goes into the header
  void* y;             // [M, N]
};

constexpr char kPackedMagic[8] = {'m', 'i', 'x', 'r', 'a', 'n', 'k', '1'};

// What packed factors begin with: whoever takes them checks that they are meant for this kernel and these factors.
struct PackedHeader {
  char magic[8];
  int32_t isa;  // KernelTable::isa_id
  Dtype dtype;
  int64_t K, N, R, Q, block_size, block_count;
  uint64_t sample;  // of the weights, see weight_sample.h
  int64_t pivoted;  // 1: with an index, else 0
  int64_t unused[6];
};
static_assert(sizeof(PackedHeader) == 128, "the panels behind it start on a cache line");

}  // namespace mixrank
