// Quads of tiles of x^T z on Hopper: what gram_sm90.h computes, with half of the reads for each product.
//
// A cluster of two blocks takes a square of 256 x 256: four tiles of 128 x 128, one to each warpgroup. Both blocks need the same 256
// columns of x, of which each has one half brought to both; the 128 columns of z are each block's own, and on the diagonal of a
// Gram matrix they are there already, among those of x. A block may fill a stage again when the warps of both have read it.
#pragma once

#include "cuda/gram_sm90.h"

namespace mixrank {

template <class Operand>
struct GramQuadSm90 {
  using Params = GramSm90Params;

  static constexpr int kArchitecture = 90;
  static constexpr int kCluster = 2;
  static constexpr int kBoxBytes = kGramDepth * kBoxRowBytes;
  static constexpr int kLeftBoxes = kGramQuad / kBoxCols, kRightBoxes = kGramTile / kBoxCols;
  static constexpr int kStages = 4;
  using Stages = WholePipeline<kStages, (kLeftBoxes + kRightBoxes) * kBoxBytes, kCluster>;
  static constexpr int kThreads = Stages::kThreads;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = Stages::kSharedBytes;

  static MIXRANK_DEVICE void produce(const Params& params, const GramTile& quad, const Stages& stages, int rank, int chunks) {
    constexpr int kShare = kLeftBoxes / kCluster;
    for (int i = 0; i < chunks; ++i) {
      stages.begin(i, (kLeftBoxes + (quad.diagonal ? 0 : kRightBoxes)) * kBoxBytes);
      const int row = static_cast<int>(quad.first_row) + i * kGramDepth;
      for (int box = rank * kShare; box < (rank + 1) * kShare; ++box) {
        load_box_to_blocks(stages.stage(i) + box * kBoxBytes, &params.x, stages.filled(i),
                           quad.at.row * kGramQuad + box * kBoxCols, row, quad.batch, (1 << kCluster) - 1);
      }
      for (int box = 0; box < kRightBoxes && !quad.diagonal; ++box) {
        load_box(stages.stage(i) + (kLeftBoxes + box) * kBoxBytes, &params.z, stages.filled(i),
                 quad.at.col * kGramQuad + rank * kGramTile + box * kBoxCols, row, quad.batch);
      }
    }
  }

  static MIXRANK_DEVICE void consume(const Params& params, const GramTile& quad, const Stages& stages, int rank, int chunks) {
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, warp = thread / 32;
    const int group = static_cast<int>(threadIdx.x) / 128;
    const GramTile tile = quad.quarter(params.gram, group, rank);
    const bool wanted = tile.wanted(params.gram), summing = params.gram.partial_sum != nullptr && tile.diagonal;
    float upper[64] = {}, lower[64] = {};
    float column_sum = 0.0f;
    for (int i = 0; i < chunks; ++i) {
      stages.wait(i);
      if (wanted) {
        const char* left = stages.stage(i) + group * kRightBoxes * kBoxBytes;
        const char* right = stages.stage(i) + (quad.diagonal ? rank * kRightBoxes : kLeftBoxes) * kBoxBytes;
        group_fence_sums(upper);
        group_fence_sums(lower);
        group_fence();
#pragma unroll
        for (int step = 0; step < kGramDepth / 16; ++step) {
          const uint64_t b = across_descriptor(shared_address(right), step, kBoxBytes);
          GramSm90<Operand>::multiply(upper, across_descriptor(shared_address(left), step, kBoxBytes), b);
          GramSm90<Operand>::multiply(lower, across_descriptor(shared_address(left) + kBoxBytes, step, kBoxBytes), b);
        }
        group_commit();
        group_fence_sums(upper);
        group_fence_sums(lower);
        if (summing) {
          const char* box = left + thread / kBoxCols * kBoxBytes;
#pragma unroll 4
          for (int row = 0; row < kGramDepth; ++row) {
            uint16_t bits;
            memcpy(&bits, box + box_offset(row, thread % kBoxCols), sizeof(bits));
            column_sum += Operand::widen(bits);
          }
        }
        group_wait<1>();  // the products of the chunk before have been read
      }
      if (i > 0) stages.release(i - 1);
    }
    group_wait<0>();
    group_fence_sums(upper);
    group_fence_sums(lower);
    if (!wanted) return;

    float* partial = tile.partial(params.gram);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      store_partial(partial, upper + i * 4, warp * 16, i * 8, lane);
      store_partial(partial, lower + i * 4, 64 + warp * 16, i * 8, lane);
    }
    if (summing) tile.partial_sum(params.gram)[thread] = column_sum;
  }

  static MIXRANK_DEVICE void run(const Params& params) {
    next_launch_start();
    const Stages stages(shared_memory());
    const int rank = cluster_rank();
    const GramTile quad = GramTile::of(params.gram, blockIdx.x / kCluster, kGramQuad);
    const int chunks = static_cast<int>(ceil_div(quad.last_row - quad.first_row, kGramDepth));
    if (threadIdx.x >= Stages::kConsumers) {
      if (threadIdx.x == Stages::kConsumers) produce(params, quad, stages, rank, chunks);
      __syncwarp();
    } else {
      consume(params, quad, stages, rank, chunks);
    }
    cluster_barrier();  // neither block goes while the other may write to its shared memory
  }
};

}  // namespace mixrank
