// From the operands of a linear operator to launches. A Launcher is CUDA's (launcher.cuh) or the emulator's:
//
//   int architecture();                             80 or 90, for the kernels of that architecture
//   TensorMap map(base, cols, rows, batches, row_stride, batch_stride, box_rows);   strides in elements of 16 bits
//   void launch<Kernel>(int64_t blocks, const Params&, bool overlaps);   overlaps: may begin before the last launch has ended
#pragma once

#include "cuda/product_sm80.h"
#include "cuda/product_sm90.h"

namespace mixrank {

// What the operands are multiplied as: bf16, or fp32 in two or three terms of bf16.
enum class LinearOperand { kBFloat16, kFloat32Two, kFloat32Three };

// y = (x down^T) up^T + (x residual_down^T) residual_up^T + x S^T + bias. Sizes in elements, rows so far apart, all else adjacent.
struct LinearArguments {
  LinearOperand operand;
  int64_t M;
  int K, N;
  const void* x;
  int64_t x_stride;
  struct Factors {
    int rank;  // 0: none
    const void* down;
    const void* up;
    int64_t down_stride, up_stride;
  } factors[2];
  const void* bias;  // or null
  SparseTerm sparse;
  void* hidden;  // scratch of hidden_elements(), on a boundary of 16 bytes
  void* y;       // [M, N], rows adjacent
};

constexpr int kHiddenStep = 8;

// Elements of one row of the intermediate: that of each pair of factors on a boundary of 16 bytes.
inline int64_t hidden_stride(int R, int Q) { return round_up(R, kHiddenStep) + round_up(Q, kHiddenStep); }

inline int access_of(const void* base, int64_t row_bytes, int element_bytes) {
  const uint64_t bits = reinterpret_cast<uint64_t>(base) | static_cast<uint64_t>(row_bytes);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : element_bytes;
}

// Whether the copy engine can bring every operand and take every output.
inline bool boxes_reach(const ProductParams& params) {
  bool reach = params.M < (int64_t{1} << 31);
  for (int i = 0; i < 2; ++i) {
    if (i < params.term_count || i < params.output_count) {
      reach = reach && params.terms[i].a_access == 16 && params.terms[i].b_access == 16;
    }
    if (i < params.output_count) reach = reach && access_of(params.outputs[i].c, params.outputs[i].stride * 2, 2) == 16;
  }
  return reach;
}

template <class Kernel, class Launcher>
void launch_tiles(Launcher& launcher, const typename Kernel::Params& params, const ProductParams& product) {
  launcher.template launch<Kernel>(ceil_div(product.M, Kernel::kRows) * tile_columns(product, Kernel::kCols), params,
                                   product.follows);
}

template <class Kernel, class Launcher>
void launch_boxes(Launcher& launcher, const ProductParams& product) {
  ProductSm90Params params{};
  params.product = product;
  for (int i = 0; i < 2; ++i) {
    const bool used = i < product.term_count || i < product.output_count;
    const Term& term = product.terms[used ? i : 0];
    const ProductParams::Output& output = product.outputs[i < product.output_count ? i : 0];
    const int rows = product.outputs[product.output_count == 2 && used ? i : 0].N;
    params.a[i] = launcher.map(term.a, term.depth, product.M, 1, term.a_stride, 0, Kernel::kRows);
    params.b[i] = launcher.map(term.b, term.depth, rows, 1, term.b_stride, 0, Kernel::kCols);
    params.c[i] = launcher.map(output.c, output.N, product.M, 1, output.stride, 0, Kernel::kGroupRows);
  }
  launch_tiles<Kernel>(launcher, params, product);
}

// From so many tiles of 128 x 128 on, large tiles fill a device.
constexpr int64_t kManyTiles = 132;
// Up to so many rows a tile of 16 wastes least.
constexpr int64_t kFewRows = 16;

template <class Launcher>
void product(Launcher& launcher, LinearOperand operand, const ProductParams& params) {
  const bool many = ceil_div(params.M, 128) * tile_columns(params, 128) >= kManyTiles;
  if (operand == LinearOperand::kFloat32Two) {
    launch_tiles<ProductSm80<Float32<2>, 64, 64, 2, 2, 4>>(launcher, params, params);
  } else if (operand == LinearOperand::kFloat32Three) {
    launch_tiles<ProductSm80<Float32<3>, 64, 64, 2, 2, 4>>(launcher, params, params);
  } else if (params.M <= kFewRows) {
    launch_tiles<ProductSm80<BFloat16, 16, 64, 1, 4, 6>>(launcher, params, params);
  } else if (launcher.architecture() == 90 && boxes_reach(params)) {
    const bool sparse = params.sparse.size != 0;
    if (many && sparse) {
      launch_boxes<ProductSm90<128, true>>(launcher, params);
    } else if (many) {
      launch_boxes<ProductSm90<128, false>>(launcher, params);
    } else if (sparse) {
      launch_boxes<ProductSm90<64, true>>(launcher, params);
    } else {
      launch_boxes<ProductSm90<64, false>>(launcher, params);
    }
  } else if (many) {
    launch_tiles<ProductSm80<BFloat16, 128, 128, 2, 4, 3>>(launcher, params, params);
  } else {
    launch_tiles<ProductSm80<BFloat16, 64, 64, 2, 2, 4>>(launcher, params, params);
  }
}

// Two launches: the intermediate of both pairs of factors, then everything into one sum.
template <class Launcher>
void linear(Launcher& launcher, const LinearArguments& call) {
  const int size = call.operand == LinearOperand::kBFloat16 ? 2 : 4;
  const int count = call.factors[1].rank > 0 ? 2 : 1;
  const int64_t stride = hidden_stride(call.factors[0].rank, call.factors[1].rank);
  ProductParams down{}, up{};
  down.M = up.M = call.M;
  down.term_count = up.output_count = 1;
  down.output_count = up.term_count = count;
  up.outputs[0] = {call.y, call.N, call.N, access_of(call.y, call.N * size, size) == 16};
  up.bias = call.bias;
  up.sparse = call.sparse;
  for (int i = 0; i < count; ++i) {
    const LinearArguments::Factors& pair = call.factors[i];
    void* hidden = static_cast<char*>(call.hidden) + (i == 0 ? 0 : round_up(call.factors[0].rank, kHiddenStep)) * size;
    down.outputs[i] = {hidden, stride, pair.rank, true};
    down.terms[i] = {call.x,
                     pair.down,
                     call.x_stride,
                     pair.down_stride,
                     call.K,
                     access_of(call.x, call.x_stride * size, size),
                     access_of(pair.down, pair.down_stride * size, size)};
    up.terms[i] = {hidden, pair.up, stride, pair.up_stride, pair.rank, 16, access_of(pair.up, pair.up_stride * size, size)};
  }
  up.follows = true;
  product(launcher, call.operand, down);
  product(launcher, call.operand, up);
}

}  // namespace mixrank
