// From the operands of a linear operator to launches.
#pragma once

#include "cuda/launch.h"
#include "cuda/linear_sm90.h"
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
  void* hidden;  // scratch for two launches: M rows of hidden_stride() elements on a boundary of 16 bytes
  void* y;       // [M, N], rows adjacent
};

constexpr int kHiddenStep = 8;

// Elements of one row of the intermediate: that of each pair of factors on a boundary of 16 bytes.
inline int64_t hidden_stride(int R, int Q) { return round_up(R, kHiddenStep) + round_up(Q, kHiddenStep); }

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

// Tiles of 128 x 128 that fill a device, and tiles of the next size that fill half of it. Not measured.
constexpr int64_t kManyTiles = 132, kSomeTiles = 66;
// Up to so many rows a tile of 16 wastes least.
constexpr int64_t kFewRows = 16;

// Tiles of 16 x 32, 32 x 32, 64 x 64 (128 x 64 in boxes) and 128 x 128.
enum class ProductTile { kBySize, kFewRows, kSmall, kMedium, kLarge };

inline ProductTile tile_by_size(const ProductParams& params, bool boxes) {
  const auto tiles = [&](int rows, int cols) { return ceil_div(params.M, rows) * tile_columns(params, cols); };
  if (params.M <= kFewRows) return ProductTile::kFewRows;
  if (tiles(128, 128) >= kManyTiles) return ProductTile::kLarge;
  return tiles(boxes ? 128 : 64, 64) >= kSomeTiles ? ProductTile::kMedium : ProductTile::kSmall;
}

template <class Launcher>
void product_in_boxes(Launcher& launcher, const ProductParams& params, bool large) {
  const bool sparse = params.sparse.size != 0;
  if (large && sparse) {
    launch_boxes<ProductSm90<128, true>>(launcher, params);
  } else if (large) {
    launch_boxes<ProductSm90<128, false>>(launcher, params);
  } else if (sparse) {
    launch_boxes<ProductSm90<64, true>>(launcher, params);
  } else {
    launch_boxes<ProductSm90<64, false>>(launcher, params);
  }
}

template <class Launcher>
void product(Launcher& launcher, LinearOperand operand, const ProductParams& params, ProductTile tile) {
  const bool boxes = launcher.architecture() == 90 && boxes_reach(params);
  if (tile == ProductTile::kBySize) tile = tile_by_size(params, boxes);
  if (operand == LinearOperand::kFloat32Two) {
    launch_tiles<ProductSm80<Float32<2>, 64, 64, 2, 2, 4>>(launcher, params, params);
  } else if (operand == LinearOperand::kFloat32Three) {
    launch_tiles<ProductSm80<Float32<3>, 64, 64, 2, 2, 4>>(launcher, params, params);
  } else if (tile == ProductTile::kFewRows) {
    launch_tiles<ProductSm80<BFloat16, 16, 32, 1, 2, 8>>(launcher, params, params);
  } else if (tile == ProductTile::kSmall) {
    launch_tiles<ProductSm80<BFloat16, 32, 32, 2, 2, 6>>(launcher, params, params);
  } else if (boxes) {
    product_in_boxes(launcher, params, tile == ProductTile::kLarge);
  } else if (tile == ProductTile::kMedium) {
    launch_tiles<ProductSm80<BFloat16, 64, 64, 2, 2, 4>>(launcher, params, params);
  } else {
    launch_tiles<ProductSm80<BFloat16, 128, 128, 2, 4, 3>>(launcher, params, params);
  }
}

inline int rank_boxes(const LinearArguments& call) {
  return static_cast<int>(ceil_div(call.factors[0].rank, kRankBox) + ceil_div(call.factors[1].rank, kRankBox));
}

// From so many blocks on, clusters that hold 128 rows each fill a device. Not measured.
constexpr int64_t kManyBlocks = 96;

// Blocks of a cluster of the one launch that does everything, or 0 where there is no such kernel.
inline int cluster_of(const LinearArguments& call, int architecture) {
  const auto reached = [](const void* base, int64_t stride) { return access_of(base, stride * 2, 2) == 16; };
  bool reach = architecture == 90 && call.operand == LinearOperand::kBFloat16 && call.sparse.size == 0 &&
               call.M < (int64_t{1} << 31) && reached(call.x, call.x_stride) && reached(call.y, call.N);
  for (const LinearArguments::Factors& pair : call.factors) {
    if (pair.rank > 0) reach = reach && reached(pair.down, pair.down_stride) && reached(pair.up, pair.up_stride);
  }
  const int boxes = rank_boxes(call);
  return !reach || boxes > 8 ? 0 : boxes > 4 ? 4 : 2;
}

// How a call is served. What has no kernel for it is passed over.
struct LinearForm {
  int launches;      // 1 or 2
  ProductTile tile;  // of two launches
};

inline LinearForm form_by_size(const LinearArguments& call, int architecture) {
  const int cluster = cluster_of(call, architecture);
  const bool one = cluster > 0 && ceil_div(call.M, 128) * cluster >= kManyBlocks;
  return {one ? 1 : 2, ProductTile::kBySize};
}

// The intermediate stays in shared memory.
template <int Cluster, class Launcher>
void linear_in_one(Launcher& launcher, const LinearArguments& call) {
  using Kernel = LinearSm90<Cluster>;
  LinearSm90Params params{};
  params.x = launcher.map(call.x, call.K, call.M, 1, call.x_stride, 0, Kernel::kRows);
  for (int i = 0; i < 2; ++i) {
    const LinearArguments::Factors& pair = call.factors[call.factors[i].rank > 0 ? i : 0];
    params.ranks[i] = call.factors[i].rank;
    params.boxes[i] = static_cast<int>(ceil_div(call.factors[i].rank, kRankBox));
    params.down[i] = launcher.map(pair.down, call.K, pair.rank, 1, pair.down_stride, 0, kRankBox);
    params.up[i] = launcher.map(pair.up, pair.rank, call.N, 1, pair.up_stride, 0, Kernel::kCols);
  }
  params.y = {call.y, call.N, call.N, true};
  params.bias = call.bias;
  params.M = call.M;
  params.K = call.K;
  launcher.template launch<Kernel>(ceil_div(call.M, Kernel::kRows) * Cluster, params, false);
}

// The intermediate of both pairs of factors goes through `hidden`, then everything into one sum.
template <class Launcher>
void linear_in_two(Launcher& launcher, const LinearArguments& call, ProductTile tile) {
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
  product(launcher, call.operand, down, tile);
  product(launcher, call.operand, up, tile);
}

template <class Launcher>
void linear(Launcher& launcher, const LinearArguments& call, LinearForm form) {
  const int cluster = cluster_of(call, launcher.architecture());
  if (form.launches == 1 && cluster == 2) {
    linear_in_one<2>(launcher, call);
  } else if (form.launches == 1 && cluster == 4) {
    linear_in_one<4>(launcher, call);
  } else {
    linear_in_two(launcher, call, form.tile);
  }
}

}  // namespace mixrank
