// Small kernels around the instructions of clusters, that test_emulator_cluster.py compares with numpy.
#include "cuda/tiles.h"
#include "emulator/emulator.h"

namespace mixrank {
namespace {

using emulator::launch;
using emulator::message_of;

constexpr int kBoxBytes = 64 * kBoxRowBytes;

enum class ExchangeFault {
  kNone,
  kNoFirstBarrier,
  kNoBarrierBetween,
  kNoLastBarrier,
  kEndsAtOnce,
  kNoFence,
  kChangedTooEarly,
  kNotSent,
};

// out [blocks, rounds, Blocks, 256] = in [blocks, rounds, 256] of all blocks of the cluster, which these send each
// other. Can leave a step out.
template <int Blocks>
struct Exchange {
  struct Params {
    const int* in;
    int* out;
    int rounds;
    ExchangeFault fault;
  };
  static constexpr int kCluster = Blocks;
  static constexpr int kThreads = 64;
  static constexpr int kTile = 256;
  static constexpr int kTileBytes = kTile * 4;
  static constexpr int kSharedBytes = Blocks * kTileBytes + 16;

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    auto* full = reinterpret_cast<uint64_t*>(shared + Blocks * kTileBytes);
    uint64_t* filled = full + 1;
    const int t = static_cast<int>(threadIdx.x), rank = cluster_rank();
    char* own = shared + rank * kTileBytes;
    const auto is = [&](ExchangeFault fault) { return p.fault == fault; };
    if (t == 0) {
      barrier_init(full, 1);
      barrier_init(filled, kThreads / 32);
      barrier_init_fence();
    }
    __syncthreads();
    if (!is(ExchangeFault::kNoFirstBarrier)) cluster_barrier();
    if (is(ExchangeFault::kEndsAtOnce) && rank == 0) return;
    for (int round = 0; round < p.rounds; ++round) {
      const int64_t tile = static_cast<int64_t>(blockIdx.x) * p.rounds + round;
      memcpy(own + t * 16, p.in + tile * kTile + t * 4, 16);
      if (!is(ExchangeFault::kNoFence)) async_fence();
      __syncwarp();
      if (t % 32 == 0) barrier_arrive(filled);
      if (t == 0) {
        barrier_wait(filled, round % 2);
        barrier_expect(full, (Blocks - 1) * kTileBytes);
        for (int to = 0; to < Blocks; ++to) {
          if (to != rank && !(is(ExchangeFault::kNotSent) && to == 1)) copy_to_block(own, full, kTileBytes, to);
        }
      }
      barrier_wait(full, round % 2);
      memcpy(p.out + tile * Blocks * kTile + t * Blocks * 4, shared + t * Blocks * 16, Blocks * 16);
      if (is(ExchangeFault::kChangedTooEarly)) {
        __syncthreads();
        memset(own + t * 16, 0, 16);
        async_fence();
      }
      const bool last = round == p.rounds - 1;
      if (!is(last ? ExchangeFault::kNoLastBarrier : ExchangeFault::kNoBarrierBetween)) cluster_barrier();
    }
  }
};

// out [blocks, 64] = the sum of what the blocks of the cluster wrote to `between` [blocks], by threads that go on after
// the second warp of each odd block has ended.
struct Ranks {
  struct Params {
    int *between, *out;
    bool waits;
  };
  static constexpr int kCluster = 4;
  static constexpr int kThreads = 64;
  static constexpr int kSharedBytes = 0;

  static MIXRANK_DEVICE void run(const Params& p) {
    const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
    const int rank = cluster_rank();
    if (threadIdx.x >= 32 && rank % 2 == 1) return;
    if (threadIdx.x == 0) p.between[block] = 1 + rank;
    if (p.waits) cluster_barrier();
    int sum = 0;
    for (int i = 0; i < kCluster; ++i) sum += p.between[block - rank + i];
    p.out[block * kThreads + threadIdx.x] = sum;
  }
};

// out [4, 64, 64] = the box at (x, y, 0) as it is in the shared memory of those `blocks` of a cluster that block
// `sender` brings it to. Only that one waits, unless `all_wait`.
struct LoadToBlocks {
  struct Params {
    TensorMap map;
    uint16_t* out;
    int x, y, sender;
    uint16_t blocks;
    int expected;  // bytes, by each block
    bool all_wait;
  };
  static constexpr int kCluster = 4;
  static constexpr int kThreads = 64;
  static constexpr int kSharedBytes = kBoxBytes + 8;

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    auto* full = reinterpret_cast<uint64_t*>(shared + kBoxBytes);
    const int rank = cluster_rank();
    const bool first = threadIdx.x == 0, gets = p.blocks >> rank & 1;
    if (first) {
      barrier_init(full, 1);
      barrier_init_fence();
    }
    cluster_barrier();
    if (first && rank == p.sender) load_box_to_blocks(shared, &p.map, full, p.x, p.y, 0, p.blocks);
    if (first && gets) barrier_expect(full, p.expected);
    if (gets && (p.all_wait || rank == p.sender)) barrier_wait(full, 0);
    cluster_barrier();
    memcpy(p.out + (rank * kThreads + threadIdx.x) * 64, shared + threadIdx.x * kBoxRowBytes, kBoxRowBytes);
  }
};

enum class SharedFault { kNone, kReleasedToItself, kPeerNotReleased, kNotShared, kNoFirstBarrier, kNoLastBarrier };

// out [2 * batches, 64, 128] = the sum of `tiles` tiles [64, 128] below each other, by both blocks of each batch's
// cluster. Each block brings half of every tile to both, into one of two stages that both have released.
struct SharedPipeline {
  struct Params {
    TensorMap map;
    int32_t* out;
    int tiles;
    SharedFault fault;
  };
  static constexpr int kCluster = 2;
  static constexpr int kStages = 2;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 32 * (kConsumers + 1);
  static constexpr int kTileBytes = kCluster * kBoxBytes;
  static constexpr int kSharedBytes = kStages * (kTileBytes + 16);

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    auto* full = reinterpret_cast<uint64_t*>(shared + kStages * kTileBytes);
    uint64_t* empty = full + kStages;
    const int t = static_cast<int>(threadIdx.x);
    if (t == 0) {
      const int blocks = p.fault == SharedFault::kReleasedToItself ? 1 : kCluster;
      for (int i = 0; i < kStages; ++i) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, kConsumers * blocks);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if (p.fault != SharedFault::kNoFirstBarrier) cluster_barrier();
    if (t < 32 * kConsumers) {
      read(p, shared, full, empty);
    } else if (t == 32 * kConsumers) {
      fill(p, shared, full, empty);
    }
    if (p.fault != SharedFault::kNoLastBarrier) cluster_barrier();
  }

  static MIXRANK_DEVICE void read(const Params& p, const char* shared, uint64_t* full, uint64_t* empty) {
    const int row = static_cast<int>(threadIdx.x), lane = row % 32;
    const bool to_itself = p.fault == SharedFault::kReleasedToItself || p.fault == SharedFault::kPeerNotReleased;
    int32_t sum[kCluster * 64] = {};
    for (int i = 0; i < p.tiles; ++i) {
      const int stage = i % kStages;
      barrier_wait(full + stage, i / kStages % 2);
      for (int col = 0; col < kCluster * 64; ++col) {
        int16_t value;
        const char* box = shared + stage * kTileBytes + col / 64 * kBoxBytes;
        memcpy(&value, box + box_offset(row, col % 64), sizeof(value));
        sum[col] += value;
      }
      __syncwarp();
      if (lane < kCluster && (!to_itself || lane == cluster_rank())) barrier_arrive_at(empty + stage, lane);
    }
    memcpy(p.out + (static_cast<int64_t>(blockIdx.x) * 64 + row) * kCluster * 64, sum, sizeof(sum));
  }

  static MIXRANK_DEVICE void fill(const Params& p, char* shared, uint64_t* full, uint64_t* empty) {
    const int rank = cluster_rank(), batch = static_cast<int>(blockIdx.x) / kCluster;
    const auto blocks = static_cast<uint16_t>(p.fault == SharedFault::kNotShared ? 1 << rank : (1 << kCluster) - 1);
    for (int i = 0; i < p.tiles; ++i) {
      const int stage = i % kStages;
      barrier_wait(empty + stage, i / kStages % 2 ^ 1);
      barrier_expect(full + stage, kTileBytes);
      load_box_to_blocks(shared + stage * kTileBytes + rank * kBoxBytes, &p.map, full + stage, 64 * rank, 64 * i, batch,
                         blocks);
    }
  }
};

enum class ClusterMistake {
  kNothing,
  kCopyOutside,
  kPartOfSixteen,
  kMisalignedCopy,
  kOutsideSharedMemory,
  kCopyWithoutInitFence,
  kCopyToEnded,
  kArriveOutside,
  kArriveWithoutInitFence,
  kArriveAtEnded,
  kArriveTooOften,
  kArriveAtNone,
  kNoBlocks,
  kBlocksOutside,
  kMisalignedBox,
  kBoxWithoutInitFence,
  kBoxToEnded,
  kHalfOfABlockWaits,
};

struct Mistaken {
  struct Params {
    TensorMap map;
    ClusterMistake mistake;
  };
  static constexpr int kCluster = 2;
  static constexpr int kThreads = 64;
  static constexpr int kSharedBytes = 1024;

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    auto* barrier = reinterpret_cast<uint64_t*>(shared + 1008);
    const bool first = threadIdx.x == 0;
    const int rank = cluster_rank();
    const auto is = [&](auto... mistakes) { return ((p.mistake == mistakes) || ...); };
    using enum ClusterMistake;
    if (first) {
      barrier_init(barrier, 3);
      if (!is(kCopyWithoutInitFence, kArriveWithoutInitFence, kBoxWithoutInitFence)) barrier_init_fence();
      if (is(kArriveTooOften)) barrier_expect(barrier, 16);
    }
    cluster_barrier();
    if (is(kCopyToEnded, kArriveAtEnded, kBoxToEnded)) {
      if (rank == 1) return;
      cluster_barrier();
    }
    if (first && rank == 0) {
      if (is(kCopyOutside)) copy_to_block(shared, barrier, 16, 2);
      if (is(kPartOfSixteen)) copy_to_block(shared, barrier, 24, 1);
      if (is(kMisalignedCopy)) copy_to_block(shared + 8, barrier, 16, 1);
      if (is(kOutsideSharedMemory)) copy_to_block(shared + 1008, barrier, 32, 1);
      if (is(kCopyWithoutInitFence, kCopyToEnded)) copy_to_block(shared, barrier, 16, 1);
      if (is(kArriveOutside)) barrier_arrive_at(barrier, -1);
      if (is(kArriveWithoutInitFence, kArriveAtEnded)) barrier_arrive_at(barrier, 1);
      for (int i = 0; i < 3 && is(kArriveTooOften); ++i) barrier_arrive_at(barrier, 1);
      if (is(kArriveAtNone)) barrier_arrive_at(barrier + 1, 1);
      if (is(kNoBlocks)) load_box_to_blocks(shared, &p.map, barrier, 0, 0, 0, 0);
      if (is(kBlocksOutside)) load_box_to_blocks(shared, &p.map, barrier, 0, 0, 0, 5);
      if (is(kMisalignedBox)) load_box_to_blocks(shared + 128, &p.map, barrier, 0, 0, 0, 3);
      if (is(kBoxWithoutInitFence, kBoxToEnded)) load_box_to_blocks(shared, &p.map, barrier, 0, 0, 0, 2);
    }
    if (is(kHalfOfABlockWaits) && (rank == 0 || threadIdx.x < 32)) cluster_barrier();
    if (is(kHalfOfABlockWaits)) __syncthreads();
  }
};

}  // namespace

extern "C" {

const char* run_exchange(const int* in, int* out, int clusters, int blocks, int rounds, int fault, bool late,
                         uint64_t seed) {
  return message_of([&] {
    const auto which = static_cast<ExchangeFault>(fault);
    if (blocks == 2) launch<Exchange<2>>(2 * clusters, 1, 1, {in, out, rounds, which}, {late, seed});
    if (blocks == 4) launch<Exchange<4>>(4 * clusters, 1, 1, {in, out, rounds, which}, {late, seed});
  });
}

const char* run_ranks(int* between, int* out, int x, int y, bool waits, bool late, uint64_t seed) {
  return message_of([&] { launch<Ranks>(x, y, 1, {between, out, waits}, {late, seed}); });
}

const char* run_load_to_blocks(const uint16_t* in, int cols, int rows, uint16_t* out, int x, int y, int sender,
                               int blocks, int expected, bool all_wait, bool late, uint64_t seed) {
  return message_of([&] {
    const TensorMap map = make_map(in, cols, rows, 1, cols * 2, int64_t{2} * cols * rows, 64);
    const auto mask = static_cast<uint16_t>(blocks);
    launch<LoadToBlocks>(4, 1, 1, {map, out, x, y, sender, mask, expected, all_wait}, {late, seed});
  });
}

const char* run_shared_pipeline(const int16_t* in, int batches, int tiles, int32_t* out, int fault, bool late,
                                uint64_t seed) {
  return message_of([&] {
    const TensorMap map = make_map(in, 128, 64 * tiles, batches, 256, int64_t{256} * 64 * tiles, 64);
    launch<SharedPipeline>(2 * batches, 1, 1, {map, out, tiles, static_cast<SharedFault>(fault)}, {late, seed});
  });
}

// global: a row of 128 bytes.
const char* run_cluster_mistake(int mistake, const char* global, bool late, uint64_t seed) {
  return message_of([&] {
    const TensorMap map = make_map(global, 64, 1, 1, 128, 128, 1);
    launch<Mistaken>(2, 1, 1, {map, static_cast<ClusterMistake>(mistake)}, {late, seed});
  });
}
}

}  // namespace mixrank
