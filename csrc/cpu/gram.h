// gram += (w * x)^T @ x and column_sum += sum over rows of w * x, for each of B batches; or cross += x^T @ z. On raw
// pointers.
//
// Shapes: x [B, M, K], row_weight [B, M] or null, gram [B, K, K], column_sum [B, K] or null; for a cross product
//   x [M, K], z [M, N], gram [K, N], no weights, no column sums, one batch.
// Layout: x and z of any strides; gram, column_sum and row_weight contiguous; row_weight in fp32, for fp64 x in fp64;
//   gram and column_sum of one dtype, fp32 or fp64; neither overlaps an input.
// Precision: blocks of one triangle are accumulated in fp32 (fp64 for fp64 x) over at most kMaxTokens rows, in running
//   sums of kBlock terms, then added to both halves of gram: the update is exactly symmetric. Column sums are running
//   sums of kBlock terms, added up in fp64. With vdpbf16ps (bf16 without weights on avx512bf16) subnormal inputs count
//   as zero.
// Order: the sums depend on the shapes and on the instruction set, not on the threads.
#pragma once

#include "cpu/types.h"

namespace mixrank {

struct GramParams {
  Dtype dtype;       // of x and z
  Dtype gram_dtype;  // of gram and column_sum
  MatrixView x;      // [M, K], the first batch
  bool cross;        // x^T @ z instead of the Gram matrix of x
  MatrixView z;      // [M, N]
  int64_t batches;
  int64_t x_batch_stride;
  const void* row_weight;  // [B, M] or null
  void* gram;              // [B, K, K] or [K, N]
  void* column_sum;        // [B, K] or null
};

}  // namespace mixrank
