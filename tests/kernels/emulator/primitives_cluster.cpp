// Small kernels around the instructions of clusters, that test_emulator.py compares with numpy.
#include "emulator/emulator.h"

namespace mixrank {
namespace {

using emulator::launch;
using emulator::message_of;

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
      barrier_init(filled, kThreads);
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
      if (t % 32 == 0) barrier_arrive(filled, 32);
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

enum class ClusterMistake {
  kNothing,
  kRankOutside,
  kPartOfSixteen,
  kMisaligned,
  kOutsideSharedMemory,
  kNoInitFence,
  kHalfOfABlockWaits,
  kTooManyArrivals,
  kNoArrivals,
};

struct Mistaken {
  struct Params {
    ClusterMistake mistake;
  };
  static constexpr int kCluster = 2;
  static constexpr int kThreads = 64;
  static constexpr int kSharedBytes = 1024;

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    auto* barrier = reinterpret_cast<uint64_t*>(shared + 1008);
    const bool first = threadIdx.x == 0;
    const auto is = [&](ClusterMistake mistake) { return p.mistake == mistake; };
    if (first) {
      barrier_init(barrier, 3);
      if (!is(ClusterMistake::kNoInitFence)) barrier_init_fence();
    }
    cluster_barrier();
    if (first && cluster_rank() == 0) {
      if (is(ClusterMistake::kRankOutside)) copy_to_block(shared, barrier, 16, 2);
      if (is(ClusterMistake::kPartOfSixteen)) copy_to_block(shared, barrier, 24, 1);
      if (is(ClusterMistake::kMisaligned)) copy_to_block(shared + 8, barrier, 16, 1);
      if (is(ClusterMistake::kOutsideSharedMemory)) copy_to_block(shared + 1008, barrier, 32, 1);
      if (is(ClusterMistake::kNoInitFence)) copy_to_block(shared, barrier, 16, 1);
      if (is(ClusterMistake::kTooManyArrivals)) barrier_arrive(barrier, 4);
      if (is(ClusterMistake::kNoArrivals)) barrier_arrive(barrier, 0);
    }
    if (is(ClusterMistake::kHalfOfABlockWaits) && (cluster_rank() == 0 || threadIdx.x < 32)) cluster_barrier();
    if (is(ClusterMistake::kHalfOfABlockWaits)) __syncthreads();
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

const char* run_cluster_mistake(int mistake, const char*, bool late, uint64_t seed) {
  return message_of([&] { launch<Mistaken>(2, 1, 1, {static_cast<ClusterMistake>(mistake)}, {late, seed}); });
}
}

}  // namespace mixrank
