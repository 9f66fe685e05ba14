// Stages of shared memory that one warp fills with boxes and the warps of two warpgroups empty, and the barriers between them.
#pragma once

#include "cuda/device.h"
#include "cuda/tiles.h"

namespace mixrank {

// Chunk i is in stage i % Stages, for the (i / Stages)th time.
template <int Stages, int StageBytes>
struct Pipeline {
  static_assert(StageBytes % 1024 == 0);
  static constexpr int kConsumerWarps = 8;
  static constexpr int kConsumers = kConsumerWarps * 32;
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kSharedBytes = Stages * StageBytes + 2 * Stages * 8;

  char* stages;
  uint64_t* full;   // the boxes are there
  uint64_t* empty;  // every consumer warp has read them

  // By all threads of the block, once.
  MIXRANK_DEVICE explicit Pipeline(char* memory)
      : stages(memory),
        full(reinterpret_cast<uint64_t*>(memory + Stages * StageBytes)),
        empty(full + Stages) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Stages; ++i) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, kConsumerWarps);
      }
      barrier_init_fence();
    }
    __syncthreads();
  }

  MIXRANK_DEVICE char* stage(int chunk) const { return stages + chunk % Stages * StageBytes; }
  MIXRANK_DEVICE uint64_t* filled(int chunk) const { return full + chunk % Stages; }

  // The producer, before it fills the chunk's stage with so many bytes.
  MIXRANK_DEVICE void begin(int chunk, int bytes) const {
    barrier_wait(empty + chunk % Stages, chunk / Stages % 2 ^ 1);
    barrier_expect(filled(chunk), bytes);
  }

  // A consumer, before it reads.
  MIXRANK_DEVICE void wait(int chunk) const { barrier_wait(filled(chunk), chunk / Stages % 2); }

  // All threads of a consumer warp, when they have read.
  MIXRANK_DEVICE void release(int chunk) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + chunk % Stages);
  }
};

}  // namespace mixrank
