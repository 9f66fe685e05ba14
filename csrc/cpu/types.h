// Plain types that the tensor layer and the kernels share. No functions with a body: a file of kernels that is
// compiled for AVX-512 must not give the linker a copy of anything that other files use.
#pragma once

#include <cstdint>

namespace mixrank {

struct BFloat {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// Signed 8-bit codes of neighbours of a product's inner dimension, which are multiplied together.
template <int kCount>
struct Codes {
  int8_t of[kCount];
};

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A matrix [rows, cols] of any strides (in elements). Where the rows do not lie at a uniform distance, row_offsets
// holds the offset of each row and row_stride is ignored.
struct MatrixView {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;
  const int64_t* row_offsets;
};

}  // namespace mixrank
