// What the kernels are given: plain structures of device pointers. Sizes are in elements unless bytes are named.
#pragma once

#include <stdint.h>

namespace mixrank {

// One term of a product: a [M, depth] and b [N, depth], inner elements adjacent, rows so far apart.
struct Term {
  const void* a;
  const void* b;
  int64_t a_stride, b_stride;
  int depth;
  int a_access, b_access;  // bytes that may be read at once: 16, 4 or the size of an element
};

// The block-sparse term x S^T: S [N, K] has blocks of size x size, stored row by row of blocks; crow [N / size + 1], col [nnz].
struct SparseTerm {
  const void* x;  // [M, K]
  int64_t x_stride;
  const void* values;  // [nnz, size, size]
  const void* crow;
  const void* col;
  bool wide_indices;  // int64, else int32
  bool aligned;       // four elements of x and of values may be read at once
  int size;           // a multiple of 16; 0 where there is none
};

// c [M, N] = sum of a b^T over the terms + x S^T + bias, or two outputs of one term each with the same a.
struct ProductParams {
  int64_t M;
  Term terms[2];
  int term_count;    // of one output
  int output_count;  // if 2, output i is that of terms[i] alone
  struct Output {
    void* c;  // [M, N]
    int64_t stride;
    int N;
    bool aligned;  // 16 bytes of a row may be written at once
  } outputs[2];
  const void* bias;  // [N] of outputs[0], or null
  bool follows;      // a is written by the launch before this one, which this one may overlap
  SparseTerm sparse;
};

// partial [splits, batches, tiles, 128, 128] = (w x)^T z over the rows of each split; tiles of the lower triangle where z is x.
struct GramParams {
  const void* x;       // [batches, M, K]
  const void* z;       // [batches, M, N]; x again for a Gram matrix
  const float* weight;  // [batches, M], or null
  int64_t x_batch_stride, x_stride, z_batch_stride, z_stride;
  int64_t M;
  int K, N, batches;
  int x_access, z_access;  // bytes that may be read at once
  bool cross;
  int64_t split_rows;
  int64_t first_split;
  float* partial;
  float* partial_sum;  // [splits, batches, row tiles, 128], or null: column sums of w x
};

// gram [batches, K, N] += the sums over splits of partial, in order; for a triangle also its mirror image.
struct ReduceParams {
  const float* partial;
  const float* partial_sum;
  int64_t splits;
  void* gram;        // contiguous
  void* column_sum;  // [batches, K] contiguous, or null
  int K, N, batches;
  bool cross;
};

}  // namespace mixrank
