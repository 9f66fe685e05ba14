// c = a b^T + ... on Hopper, by the copy engine and wgmma: ProductParams' contract for bf16 operands whose rows are multiples of
// 16 bytes apart.
//
// A block computes a tile of 128 x Cols with all its terms in one sum. One warp has boxes of 64 columns brought, 128 rows of a and
// Cols of b to a stage; each of two warpgroups multiplies 64 rows of a by all of b. The sums leave through shared memory, as
// boxes, so that whole lines are written. Two blocks share a multiprocessor: one multiplies while the other writes.
//
// As the second of two launches it may begin before the first has ended: everything but its own a is there already.
#pragma once

#include "cuda/operands.h"
#include "cuda/pipeline_sm90.h"
#include "cuda/product_tiles.h"
#include "cuda/sparse.h"

namespace mixrank {

struct ProductSm90Params {
  ProductParams product;
  TensorMap a[2], b[2];  // of each term: boxes of 128 and of Cols rows
  TensorMap c[2];        // of each output: boxes of 64 rows
};

// The block-sparse term takes registers that the others can do without: HasSparse is a kernel of its own.
template <int Cols, bool HasSparse>
struct ProductSm90 {
  using Params = ProductSm90Params;
  using Operand = BFloat16;

  static constexpr int kRows = 128, kCols = Cols, kDepth = 64;
  static constexpr int kLeftBytes = kRows * kBoxRowBytes, kRightBytes = Cols * kBoxRowBytes;
  static constexpr int kStages = Cols == 128 ? 3 : 4;
  using Stages = WholePipeline<kStages, kLeftBytes + kRightBytes>;
  static constexpr int kArchitecture = 90;
  static constexpr int kThreads = Stages::kThreads;
  static constexpr int kBlocksPerSm = HasSparse && Cols == 128 ? 1 : 2;
  static constexpr int kSharedBytes = Stages::kSharedBytes;
  static constexpr int kGroupRows = 64;
  static constexpr int kOutputBoxBytes = kGroupRows * kBoxRowBytes;
  static constexpr int kColTiles = Cols / 8;
  static_assert(2 * (Cols / kBoxCols) * kOutputBoxBytes <= kStages * (kLeftBytes + kRightBytes));

  static MIXRANK_DEVICE void load_right(const Params& params, const OutputTile& where, const Stages& stages, int index) {
    const Chunk chunk = chunk_at(params.product, where.output, index, kDepth);
    stages.begin(index, kLeftBytes + kRightBytes);
    load_box(stages.stage(index) + kLeftBytes, &params.b[chunk.term], stages.filled(index), chunk.depth,
             where.tile.col * Cols, 0);
  }

  static MIXRANK_DEVICE void load_left(const Params& params, const OutputTile& where, const Stages& stages, int index) {
    const Chunk chunk = chunk_at(params.product, where.output, index, kDepth);
    load_box(stages.stage(index), &params.a[chunk.term], stages.filled(index), chunk.depth, where.tile.row * kRows, 0);
  }

  static MIXRANK_DEVICE void produce(const Params& params, const OutputTile& where, const Stages& stages, int chunks) {
    // What does not depend on the launch before this one is asked for before that one is waited for.
    const int early = chunks < kStages ? chunks : kStages;
    for (int i = 0; i < early; ++i) load_right(params, where, stages, i);
    if (params.product.follows) previous_launch_wait();
    for (int i = 0; i < chunks; ++i) {
      if (i >= early) load_right(params, where, stages, i);
      load_left(params, where, stages, i);
    }
  }

  static MIXRANK_DEVICE void multiply(float (&sum)[kColTiles * 4], const Stages& stages, int group, int chunks) {
    for (int i = 0; i < chunks; ++i) {
      stages.wait(i);
      const uint32_t stage = shared_address(stages.stage(i));
      group_fence_sums(sum);
      group_fence();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
        multiply_group_bf16<false>(sum, rows_descriptor(stage, group * kGroupRows, step),
                                   rows_descriptor(stage + kLeftBytes, 0, step));
      }
      group_commit();
      group_fence_sums(sum);
      group_wait<1>();  // the products of the chunk before have been read
      if (i > 0) stages.release(i - 1);
    }
    group_wait<0>();
    group_fence_sums(sum);
  }

  static MIXRANK_DEVICE void run(const Params& params) {
    const Stages stages(shared_memory());
    next_launch_start();
    const ProductParams& product = params.product;
    const OutputTile where = output_tile(product, blockIdx.x, Cols);
    const int chunks = chunk_count(product, where.output, kDepth);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, group = warp / 4;
    if (warp == Stages::kConsumerWarps) {
      if (lane == 0) produce(params, where, stages, chunks);
      return;
    }

    float sums[1][kColTiles][4] = {};
    auto& sum = reinterpret_cast<float(&)[kColTiles * 4]>(sums);
    multiply(sum, stages, group, chunks);

    const int row = group * kGroupRows, col = where.tile.col * Cols;
    const int N = product.outputs[where.output].N;
    const int64_t first_row = static_cast<int64_t>(where.tile.row) * kRows;
    if constexpr (HasSparse) {
      add_sparse<Operand>(sums, product.sparse, first_row + warp * 16, col, product.M, N, lane);
    }
    named_barrier(1, Stages::kConsumers);  // all boxes have been read
    char* boxes = stages.stages + group * (Cols / kBoxCols) * kOutputBoxBytes;
    const auto* bias = static_cast<const uint16_t*>(product.bias);
#pragma unroll
    for (int i = 0; i < kColTiles; ++i) {
      const int n = col + i * 8 + lane % 4 * 2;
      const float low = bias != nullptr && n < N ? BFloat16::widen(bias[n]) : 0.0f;
      const float high = bias != nullptr && n + 1 < N ? BFloat16::widen(bias[n + 1]) : 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = BFloat16::narrow(sums[0][i][half * 2] + low, sums[0][i][half * 2 + 1] + high);
        char* to = boxes + i / 8 * kOutputBoxBytes +
                   box_offset(warp % 4 * 16 + half * 8 + lane / 4, i % 8 * 8 + lane % 4 * 2);
        memcpy(to, &pair, sizeof(pair));
      }
    }
    async_fence();
    group == 0 ? named_barrier(2, 128) : named_barrier(3, 128);
    if (thread % 128 == 0) {
      for (int box = 0; box < Cols / kBoxCols; ++box) {
        if (col + box * kBoxCols >= N || first_row + row >= product.M) continue;
        store_box(&params.c[where.output], boxes + box * kOutputBoxBytes, col + box * kBoxCols,
                  static_cast<int>(first_row) + row, 0);
      }
      store_wait();
    }
  }
};

}  // namespace mixrank
