// Stages of shared memory that one warp fills with boxes and other warps empty, and the barriers between them.
#pragma once

#include "cuda/device.h"
#include "cuda/tiles.h"

namespace mixrank {

// Chunk i is in stage i % Stages, for the (i / Stages)th time. ConsumerWarps warps read every chunk; with a Cluster the warps of so many
// blocks, each of its own stage, since every block writes to the stages of all.
template <int Stages, int StageBytes, int ConsumerWarps, int Cluster = 1>
struct Pipeline {
  static_assert(StageBytes % 1024 == 0);
  static constexpr int kBarriers = 2 * Stages;

  char* stages;
  uint64_t* full;   // the boxes are there
  uint64_t* empty;  // every consumer warp has read them

  MIXRANK_DEVICE Pipeline(char* memory, uint64_t* barriers) : stages(memory), full(barriers), empty(barriers + Stages) {}

  // By one thread, before all others use it; barrier_init_fence follows.
  MIXRANK_DEVICE void init() const {
    for (int i = 0; i < Stages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, ConsumerWarps * Cluster);
    }
  }

  MIXRANK_DEVICE char* stage(int chunk) const { return stages + chunk % Stages * StageBytes; }
  MIXRANK_DEVICE uint64_t* filled(int chunk) const { return full + chunk % Stages; }

  // The producer, before it fills the chunk's stage with so many bytes.
  MIXRANK_DEVICE void begin(int chunk, int bytes) const {
    barrier_wait(empty + chunk % Stages, chunk / Stages % 2 ^ 1);
    barrier_expect(filled(chunk), bytes);
  }

  // The producer, after its last chunk: until all of them have been read.
  MIXRANK_DEVICE void drain(int chunks) const {
    for (int i = chunks < Stages ? 0 : chunks - Stages; i < chunks; ++i) {
      barrier_wait(empty + i % Stages, i / Stages % 2);
    }
  }

  // A consumer, before it reads.
  MIXRANK_DEVICE void wait(int chunk) const { barrier_wait(filled(chunk), chunk / Stages % 2); }

  // All threads of a consumer warp, when they have read.
  MIXRANK_DEVICE void release(int chunk) const {
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (Cluster == 1) {
      if (lane == 0) barrier_arrive(empty + chunk % Stages);
    } else {
      if (lane < Cluster) barrier_arrive_at(empty + chunk % Stages, lane);
    }
  }
};

// One warp fills what the eight warps of two groups empty, and nothing else is in shared memory.
template <int Stages, int StageBytes, int Cluster = 1>
struct WholePipeline : Pipeline<Stages, StageBytes, 8, Cluster> {
  using Base = Pipeline<Stages, StageBytes, 8, Cluster>;
  static constexpr int kConsumerWarps = 8;
  static constexpr int kConsumers = kConsumerWarps * 32;
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kSharedBytes = Stages * StageBytes + Base::kBarriers * 8;

  // By all threads of the block, or of the cluster, once.
  MIXRANK_DEVICE explicit WholePipeline(char* memory)
      : Base(memory, reinterpret_cast<uint64_t*>(memory + Stages * StageBytes)) {
    if (threadIdx.x == 0) {
      Base::init();
      barrier_init_fence();
    }
    if constexpr (Cluster == 1) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
  }
};

}  // namespace mixrank
