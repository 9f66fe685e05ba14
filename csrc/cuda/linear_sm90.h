// Both products of a linear operator in one launch on Hopper: y = (x down^T) up^T + bias, with the factors of a residual as
// more ranks, for bf16 operands whose rows are multiples of 16 bytes apart, and at most 128 * Cluster ranks.
//
// A cluster of `Cluster` blocks takes 128 rows of x. Each block computes the intermediate of up to two boxes of 64 ranks, rounds it to
// bf16 and copies it into the shared memory of the others; from then on every block holds the whole intermediate of its rows, as the
// left operand of the second product, and no part of it goes through global memory. Tiles of 128 columns of y are dealt to the
// blocks, and in a block to its two warpgroups in turn, each with a warp that fetches up for it: while one group writes its tile, the
// other multiplies.
#pragma once

#include "cuda/params.h"
#include "cuda/pipeline_sm90.h"
#include "cuda/schedule.h"
#include "cuda/store.h"

namespace mixrank {

constexpr int kRankBox = 64;

struct LinearSm90Params {
  TensorMap x;                 // boxes of 128 rows
  TensorMap down[2], up[2];    // of each pair of factors: boxes of 64 and of 128 rows
  int ranks[2], boxes[2];      // of each pair, and in boxes of 64
  ProductParams::Output y;     // [M, N], aligned
  const void* bias;            // [N], or null
  int64_t M;
  int K;
};

// Which boxes of ranks a block of the cluster computes: as even as can be, and none may be left for the last ones.
struct RankShare {
  int first, count;
};

MIXRANK_HOST_DEVICE RankShare rank_share(int boxes, int rank, int cluster) {
  const int each = static_cast<int>(ceil_div(boxes, cluster)), first = rank * each;
  const int left = boxes - first;
  return {first, left < 0 ? 0 : left < each ? left : each};
}

// Tile `turn` of a warpgroup: tiles of columns are dealt to blocks, and in a block to groups.
MIXRANK_HOST_DEVICE constexpr int dealt_tile(int turn, int rank, int cluster, int group) {
  return (turn * 2 + group) * cluster + rank;
}

template <int Cluster>
struct LinearSm90 {
  using Params = LinearSm90Params;
  using Operand = BFloat16;

  static constexpr int kArchitecture = 90;
  static constexpr int kCluster = Cluster;
  static constexpr int kRows = 128, kCols = 128, kDepth = 64;
  static constexpr int kBoxBytes = kRows * kBoxRowBytes;             // of x, up and the intermediate
  static constexpr int kDownBytes = kRankBox * kBoxRowBytes;
  static constexpr int kMostBoxes = 2 * Cluster;
  static constexpr int kStages = Cluster == 2 ? 4 : 3;
  // The first product has stages of a box of x and two of down; the second, in the same memory, stages of one box of up for each group.
  using DownStages = Pipeline<kStages, 2 * kBoxBytes, 8>;
  using UpStages = Pipeline<kStages, kBoxBytes, 4>;
  static constexpr int kStageBytes = kStages * 2 * kBoxBytes;
  static constexpr int kHiddenBytes = kMostBoxes * kBoxBytes;
  static constexpr int kBarriers = DownStages::kBarriers + 2 * UpStages::kBarriers + 1;
  static constexpr int kSharedBytes = kStageBytes + kHiddenBytes + kBarriers * 8;
  static constexpr int kConsumers = 256;
  static constexpr int kThreads = kConsumers + 64;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kGroupRows = 64;

  struct Block {
    int rank, row_tile, boxes, chunks, tiles;
    RankShare share;
    char* memory;
    uint64_t* barriers;
    DownStages down;
    char* hidden;
    uint64_t* hidden_full;

    MIXRANK_DEVICE Block(const Params& params, char* memory, uint64_t* barriers)
        : rank(cluster_rank()),
          row_tile(static_cast<int>(blockIdx.x) / Cluster),
          boxes(params.boxes[0] + params.boxes[1]),
          chunks(static_cast<int>(ceil_div(params.K, kDepth))),
          tiles(static_cast<int>(ceil_div(params.y.N, kCols))),
          share(rank_share(boxes, rank, Cluster)),
          memory(memory),
          barriers(barriers),
          down(memory, barriers),
          hidden(memory + kStageBytes),
          hidden_full(barriers + kBarriers - 1) {}

    MIXRANK_DEVICE UpStages up(int group) const {
      return UpStages(memory + group * kStages * kBoxBytes,
                      barriers + DownStages::kBarriers + group * UpStages::kBarriers);
    }

    MIXRANK_DEVICE void init() const {
      down.init();
      up(0).init();
      up(1).init();
      barrier_init(hidden_full, 1);
      barrier_init_fence();
      barrier_expect(hidden_full, (boxes - share.count) * kBoxBytes);
    }
  };

  // Box of ranks `box`: of which pair of factors, and its first rank.
  static MIXRANK_DEVICE int pair_of(const Params& params, int box) { return box < params.boxes[0] ? 0 : 1; }
  static MIXRANK_DEVICE int rank_of(const Params& params, int box) {
    return (box < params.boxes[0] ? box : box - params.boxes[0]) * kRankBox;
  }

  static MIXRANK_DEVICE void fetch_down(const Params& params, const Block& block) {
    if (block.share.count == 0) return;
    for (int i = 0; i < block.chunks; ++i) {
      block.down.begin(i, kBoxBytes + block.share.count * kDownBytes);
      load_box(block.down.stage(i), &params.x, block.down.filled(i), i * kDepth, block.row_tile * kRows, 0);
      for (int j = 0; j < block.share.count; ++j) {
        const int box = block.share.first + j;
        load_box(block.down.stage(i) + kBoxBytes + j * kDownBytes, &params.down[pair_of(params, box)], block.down.filled(i),
                 i * kDepth, rank_of(params, box), 0);
      }
    }
    block.down.drain(block.chunks);
  }

  static MIXRANK_DEVICE void fetch_up(const Params& params, const Block& block, int group) {
    const UpStages up = block.up(group);
    int chunk = 0;
    for (int turn = 0;; ++turn) {
      const int tile = dealt_tile(turn, block.rank, Cluster, group);
      if (tile >= block.tiles) return;
      for (int box = 0; box < block.boxes; ++box, ++chunk) {
        up.begin(chunk, kBoxBytes);
        load_box(up.stage(chunk), &params.up[pair_of(params, box)], up.filled(chunk),
                 rank_of(params, box), tile * kCols, 0);
      }
    }
  }

  // The intermediate of Boxes boxes of ranks, 64 rows to each group, into this block's shared memory.
  template <int Boxes>
  static MIXRANK_DEVICE void multiply_down(const Params& params, const Block& block, int group, int warp, int lane) {
    float sum[Boxes * 32] = {};
    for (int i = 0; i < block.chunks; ++i) {
      block.down.wait(i);
      const uint32_t stage = shared_address(block.down.stage(i));
      group_fence_sums(sum);
      group_fence();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
        multiply_group_bf16<false>(sum, rows_descriptor(stage, group * kGroupRows, step),
                                   rows_descriptor(stage + kBoxBytes, 0, step));
      }
      group_commit();
      group_fence_sums(sum);
      group_wait<1>();
      if (i > 0) block.down.release(i - 1);
    }
    group_wait<0>();
    group_fence_sums(sum);
    block.down.release(block.chunks - 1);
    // Past the last rank an infinite x times zero is NaN, which must not meet the zeros of up.
#pragma unroll
    for (int i = 0; i < Boxes * 8; ++i) {
      const int box = block.share.first + i / 8;
      const int left = params.ranks[pair_of(params, box)] - rank_of(params, box) - (i % 8 * 8 + lane % 4 * 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = BFloat16::narrow(left > 0 ? sum[i * 4 + half * 2] : 0.0f,
                                               left > 1 ? sum[i * 4 + half * 2 + 1] : 0.0f);
        char* to = block.hidden + box * kBoxBytes +
                   box_offset(warp * 16 + half * 8 + lane / 4, i % 8 * 8 + lane % 4 * 2);
        memcpy(to, &pair, sizeof(pair));
      }
    }
  }

  // The boxes that this block computed, to the others; then until theirs are here.
  static MIXRANK_DEVICE void share_hidden(const Block& block) {
    async_fence();
    named_barrier(1, kConsumers);
    if (threadIdx.x == 0) {
      for (int j = 0; j < block.share.count; ++j) {
        const char* box = block.hidden + (block.share.first + j) * kBoxBytes;
        for (int other = 1; other < Cluster; ++other) {
          copy_to_block(box, block.hidden_full, kBoxBytes, (block.rank + other) % Cluster);
        }
      }
    }
    barrier_wait(block.hidden_full, 0);
  }

  static MIXRANK_DEVICE void multiply_up(const Params& params, const Block& block, int group, int warp, int lane) {
    const UpStages up = block.up(group);
    const uint32_t hidden = shared_address(block.hidden);
    int chunk = 0;
    for (int turn = 0;; ++turn) {
      const int tile = dealt_tile(turn, block.rank, Cluster, group);
      if (tile >= block.tiles) return;
      float sums[2][16][4] = {};
      auto& upper = reinterpret_cast<float(&)[64]>(sums[0]);
      auto& lower = reinterpret_cast<float(&)[64]>(sums[1]);
      for (int box = 0; box < block.boxes; ++box, ++chunk) {
        up.wait(chunk);
        const uint32_t left = hidden + box * kBoxBytes, right = shared_address(up.stage(chunk));
        group_fence_sums(upper);
        group_fence_sums(lower);
        group_fence();
#pragma unroll
        for (int step = 0; step < kDepth / 16; ++step) {
          multiply_group_bf16<false>(upper, rows_descriptor(left, 0, step), rows_descriptor(right, 0, step));
          multiply_group_bf16<false>(lower, rows_descriptor(left, kGroupRows, step), rows_descriptor(right, 0, step));
        }
        group_commit();
        group_fence_sums(upper);
        group_fence_sums(lower);
        group_wait<1>();
        if (box > 0) up.release(chunk - 1);
      }
      group_wait<0>();
      group_fence_sums(upper);
      group_fence_sums(lower);
      up.release(chunk - 1);
      const int64_t row = static_cast<int64_t>(block.row_tile) * kRows + warp % 4 * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_rows<Operand>(sums[half], params.y, params.bias, row + half * kGroupRows, tile * kCols, params.M, lane);
      }
    }
  }

  static MIXRANK_DEVICE void run(const Params& params) {
    char* memory = shared_memory();
    const Block block(params, memory, reinterpret_cast<uint64_t*>(memory + kStageBytes + kHiddenBytes));
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    if (thread == 0) block.init();
    cluster_barrier();  // the others' barriers are there before anything is copied to them
    if (warp >= 8) {
      if (warp == 8 && lane == 0) fetch_down(params, block);
      __syncwarp();
      named_barrier(2, 64);  // the stages of the first product are empty
      if (lane == 0) fetch_up(params, block, warp - 8);
      __syncwarp();
    } else {
      const int group = warp / 4;
      if (block.share.count == 2) {
        multiply_down<2>(params, block, group, warp, lane);
      } else if (block.share.count == 1) {
        multiply_down<1>(params, block, group, warp, lane);
      }
      share_hidden(block);
      multiply_up(params, block, group, warp, lane);
    }
    cluster_barrier();  // no block's shared memory goes before the others have read it
  }
};

}  // namespace mixrank
