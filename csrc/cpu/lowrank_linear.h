// y = (x @ down^T) @ up^T + bias on raw pointers.
//
// Shapes: x [M, K], down [R, K], up [N, R], bias [N] or null, y [M, N]; all of one dtype, K, N, R >= 1, M >= 0.
// Layout: x, down and up of any strides and any alignment of their own dtype; y contiguous; y overlaps no input.
// Precision: products are accumulated in fp32 (fp64 for fp64), at most kBlock terms in one running sum. The
//   intermediate x @ down^T stays in that precision; y is rounded once, to nearest even, after the bias is added.
//   With vdpbf16ps (bf16 on avx512bf16, first product only) subnormal inputs and partial sums count as zero.
// Order: the sum behind an element of y depends on the shapes and on the instruction set, not on the threads.
// Memory: no ownership is taken; scratch belongs to the calling threads (runtime.h).
#pragma once

#include "cpu/types.h"

namespace mixrank {

struct LowrankLinearParams {
  Dtype dtype;
  MatrixView x;     // [M, K]
  MatrixView down;  // [R, K]
  MatrixView up;    // [N, R]
  const void* bias;  // [N] or null
  int64_t bias_stride;
  void* y;  // [M, N]
};

}  // namespace mixrank
