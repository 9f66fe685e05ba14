// Tiles of x^T z on Hopper, by the copy engine and wgmma: GramParams' contract for operands of 16 bits without weights whose
// rows are multiples of 16 bytes apart.
//
// A block sums one tile of 128 x 128 over the rows of one split. One warp has boxes of 64 rows x 64 columns brought, two of x and
// two of z to a stage (a tile on the diagonal takes those of x for both); each of two warpgroups multiplies one box of x by both of z.
// The terms lie across the rows of the boxes for both operands, so nothing is ever transposed.
#pragma once

#include "cuda/gram_tiles.h"
#include "cuda/operands.h"
#include "cuda/pipeline_sm90.h"

namespace mixrank {

struct GramSm90Params {
  GramParams gram;
  TensorMap x, z;  // boxes of kGramDepth rows
};

constexpr int kGramDepth = 64;

template <class Operand>
struct GramSm90 {
  using Params = GramSm90Params;

  static constexpr int kBoxBytes = kGramDepth * kBoxRowBytes;
  static constexpr int kStages = 3;
  using Stages = WholePipeline<kStages, 4 * kBoxBytes>;
  static constexpr int kArchitecture = 90;
  static constexpr int kThreads = Stages::kThreads;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kSharedBytes = Stages::kSharedBytes;

  static MIXRANK_DEVICE void produce(const Params& params, const GramTile& where, const Stages& stages, int chunks) {
    prefetch_map(&params.x);
    prefetch_map(&params.z);
    for (int i = 0; i < chunks; ++i) {
      stages.begin(i, (where.diagonal ? 2 : 4) * kBoxBytes);
      const int row = static_cast<int>(where.first_row) + i * kGramDepth;
      for (int box = 0; box < 2; ++box) {
        load_box(stages.stage(i) + box * kBoxBytes, &params.x, stages.filled(i),
                 where.at.row * kGramTile + box * kBoxCols, row, where.batch);
        if (!where.diagonal) {
          load_box(stages.stage(i) + (2 + box) * kBoxBytes, &params.z, stages.filled(i),
                   where.at.col * kGramTile + box * kBoxCols, row, where.batch);
        }
      }
    }
  }

  static MIXRANK_DEVICE void multiply(float (&sum)[64], uint64_t a, uint64_t b) {
    if constexpr (Operand::kIsBFloat16) {
      multiply_group_bf16<true>(sum, a, b);
    } else {
      multiply_group_fp16<true>(sum, a, b);
    }
  }

  static MIXRANK_DEVICE void run(const Params& params) {
    next_launch_start();
    const Stages stages(shared_memory());
    const GramTile where = GramTile::of(params.gram, blockIdx.x, kGramTile);
    const int chunks = static_cast<int>(ceil_div(where.last_row - where.first_row, kGramDepth));
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    if (warp == Stages::kConsumerWarps) {
      if (lane == 0) produce(params, where, stages, chunks);
      return;
    }

    const int group = warp / 4;
    const bool summing = params.gram.partial_sum != nullptr && where.diagonal;
    const int sum_col = thread % 64, sum_row = thread % 128 / 64 * (kGramDepth / 2);
    float sum[64] = {};
    float column_sum = 0.0f;
    for (int i = 0; i < chunks; ++i) {
      stages.wait(i);
      const uint32_t boxes = shared_address(stages.stage(i));
      const uint32_t right = where.diagonal ? boxes : boxes + 2 * kBoxBytes;
      group_fence_sums(sum);
      group_fence();
#pragma unroll
      for (int step = 0; step < kGramDepth / 16; ++step) {
        multiply(sum, across_descriptor(boxes + group * kBoxBytes, step, kBoxBytes),
                 across_descriptor(right, step, kBoxBytes));
      }
      group_commit();
      group_fence_sums(sum);
      if (summing) {
        const char* box = stages.stage(i) + group * kBoxBytes;
#pragma unroll 4
        for (int row = 0; row < kGramDepth / 2; ++row) {
          uint16_t bits;
          memcpy(&bits, box + box_offset(sum_row + row, sum_col), sizeof(bits));
          column_sum += Operand::widen(bits);
        }
      }
      group_wait<1>();  // the products of the chunk before have been read
      if (i > 0) stages.release(i - 1);
    }
    group_wait<0>();
    group_fence_sums(sum);

    float* partial = where.partial(params.gram);
#pragma unroll
    for (int i = 0; i < 16; ++i) store_partial(partial, sum + i * 4, warp * 16, i * 8, lane);
    if (summing) {
      // Every box has been read: the halves of the columns meet in the first stage.
      named_barrier(1, Stages::kConsumers);
      auto* halves = reinterpret_cast<float*>(stages.stages);
      halves[thread] = column_sum;
      named_barrier(1, Stages::kConsumers);
      if (thread % 128 < 64) where.partial_sum(params.gram)[group * 64 + sum_col] = halves[thread] + halves[thread + 64];
    }
  }
};

}  // namespace mixrank
