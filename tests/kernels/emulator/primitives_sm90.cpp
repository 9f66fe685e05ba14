// Small kernels around the instructions of sm_90, that test_emulator.py compares with numpy. Most can leave a step out.
#include "cuda/tiles.h"
#include "emulator/emulator.h"

namespace mixrank {
namespace {

using emulator::launch;
using emulator::message_of;

constexpr int kBoxBytes = 64 * kBoxRowBytes;

// out [64, 64] = the 8192 bytes that the box at (x, y, z) is in shared memory.
struct LoadBox {
  struct Params {
    TensorMap map;
    uint16_t* out;
    int x, y, z;
    bool waits;
  };
  static constexpr int kThreads = 64;
  static constexpr int kSharedBytes = kBoxBytes + 8;

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    auto* full = reinterpret_cast<uint64_t*>(shared + kBoxBytes);
    if (threadIdx.x == 0) {
      prefetch_map(&p.map);
      barrier_init(full, 1);
      barrier_init_fence();
      barrier_expect(full, kBoxBytes);
      load_box(shared, &p.map, full, p.x, p.y, p.z);
    }
    __syncthreads();
    if (p.waits) barrier_wait(full, 0);
    memcpy(p.out + threadIdx.x * 64, shared + threadIdx.x * 128, 128);
  }
};

enum class StoreFault { kNone, kNoFence, kNoWait, kChangedBeforeWait };

// Stores in [64, 64] as the box at (x, y, z).
struct StoreBox {
  struct Params {
    TensorMap map;
    const uint16_t* in;
    int x, y, z;
    StoreFault fault;
  };
  static constexpr int kThreads = 64;
  static constexpr int kSharedBytes = kBoxBytes;

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    const int row = static_cast<int>(threadIdx.x);
    for (int col = 0; col < 64; ++col) memcpy(shared + box_offset(row, col), p.in + row * 64 + col, 2);
    if (p.fault != StoreFault::kNoFence) async_fence();
    __syncthreads();
    if (row != 0) return;
    store_box(&p.map, shared, p.x, p.y, p.z);
    if (p.fault == StoreFault::kChangedBeforeWait) {
      memset(shared, 0, kBoxBytes);
      async_fence();
    }
    if (p.fault != StoreFault::kNoWait) store_wait();
  }
};

enum class PipelineFault { kNone, kNotFull, kNotEmpty, kWrongParity, kTooManyBytes, kNoInit };

// out [128, 64] = of each warp, the sum of `tiles` boxes below each other, through two stages that one warp fills.
struct Pipeline {
  struct Params {
    TensorMap map;
    int32_t* out;
    int tiles;
    PipelineFault fault;
  };
  static constexpr int kStages = 2;
  static constexpr int kConsumers = 4;
  static constexpr int kThreads = 32 * (kConsumers + 1);
  static constexpr int kSharedBytes = kStages * (kBoxBytes + 16);

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    auto* full = reinterpret_cast<uint64_t*>(shared + kStages * kBoxBytes);
    uint64_t* empty = full + kStages;
    const int t = static_cast<int>(threadIdx.x);
    if (t == 0 && p.fault != PipelineFault::kNoInit) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, kConsumers);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if (t >= 32 * kConsumers) {
      if (t == 32 * kConsumers) fill(p, shared, full, empty);
      return;
    }
    int sum[64] = {};
    for (int i = 0; i < p.tiles; ++i) {
      const int stage = i % kStages, parity = i / kStages % 2;
      if (p.fault != PipelineFault::kNotFull) barrier_wait(full + stage, parity);
      for (int row = t % 32; row < 64; row += 32) {
        for (int col = 0; col < 64; ++col) {
          int16_t value;
          memcpy(&value, shared + stage * kBoxBytes + box_offset(row, col), sizeof(value));
          sum[col] += value;
        }
      }
      __syncwarp();
      if (t % 32 == 0) barrier_arrive(empty + stage);
    }
    memcpy(p.out + t * 64, sum, sizeof(sum));
  }

  static MIXRANK_DEVICE void fill(const Params& p, char* shared, uint64_t* full, uint64_t* empty) {
    for (int i = 0; i < p.tiles; ++i) {
      const int stage = i % kStages, before = i / kStages % 2 ^ 1;
      const int parity = p.fault == PipelineFault::kWrongParity ? before ^ 1 : before;
      if (p.fault != PipelineFault::kNotEmpty) barrier_wait(empty + stage, parity);
      barrier_expect(full + stage, p.fault == PipelineFault::kTooManyBytes ? kBoxBytes + 16 : kBoxBytes);
      load_box(shared + stage * kBoxBytes, &p.map, full + stage, 0, 64 * i, 0);
    }
  }
};

enum class GroupFault { kNone, kNoWait, kEarlyRead, kNoFence, kNoAsyncFence, kTooFewWaited, kDifferentOperands };

// out [64, N] = a b over `steps` of 64 terms, a and b as rows of terms or, AcrossRows, as terms of rows. The first step
// adds to the sums `start`.
template <int N, bool AcrossRows, bool IsBf16>
struct Group {
  struct Params {
    TensorMap a, b;
    float* out;
    float start;
    int steps;
    GroupFault fault;
  };
  static constexpr int kThreads = 128;
  static constexpr int kBytes = (1 + N / 64) * kBoxBytes;
  static constexpr int kSharedBytes = kBytes + 8;

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    auto* full = reinterpret_cast<uint64_t*>(shared + kBytes);
    const int t = static_cast<int>(threadIdx.x);
    if (t == 0) {
      barrier_init(full, 1);
      barrier_init_fence();
    }
    __syncthreads();
    float sum[N / 2], early = 0;
    for (float& value : sum) value = p.start;
    for (int step = 0; step < p.steps; ++step) {
      if (t == 0) {
        barrier_expect(full, kBytes);
        const int x = AcrossRows ? 0 : 64 * step, y = AcrossRows ? 64 * step : 0;
        load_box(shared, &p.a, full, x, y, 0);
        for (int i = 0; i < N / 64; ++i) {
          load_box(shared + (1 + i) * kBoxBytes, &p.b, full, AcrossRows ? 64 * i : x, AcrossRows ? y : 64 * i, 0);
        }
      }
      barrier_wait(full, step % 2);
      if (p.fault == GroupFault::kNoAsyncFence) {
        memset(shared + t * 64, 0, 64);
        __syncthreads();
      }
      if (p.fault != GroupFault::kNoFence) group_fence();
      for (int i = 0; i < 4; ++i) {
        multiply(sum, shared_address(shared), p.fault == GroupFault::kDifferentOperands && t < 32 ? 0 : i);
        if (i % 2 == 1) group_commit();
        if (i == 2) group_wait<1>();
      }
      if (p.fault == GroupFault::kEarlyRead) early = sum[0];
      if (p.fault == GroupFault::kTooFewWaited) {
        group_wait<1>();
      } else if (p.fault != GroupFault::kNoWait) {
        group_wait<0>();
      }
      group_fence_sums(sum);
      __syncthreads();
    }
    if (p.fault == GroupFault::kTooFewWaited) group_wait<0>();
    if (p.fault == GroupFault::kEarlyRead) sum[0] = early;
    for (int i = 0; i < N / 2; ++i) {
      p.out[(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + t % 4 * 2 + i % 2] = sum[i];
    }
  }

  static MIXRANK_DEVICE void multiply(float (&sum)[N / 2], uint32_t box, int step) {
    const uint32_t b_box = box + kBoxBytes;
    const uint64_t a = AcrossRows ? across_descriptor(box, step, kBoxBytes) : rows_descriptor(box, 0, step);
    const uint64_t b = AcrossRows ? across_descriptor(b_box, step, kBoxBytes) : rows_descriptor(b_box, 0, step);
    if constexpr (IsBf16) {
      multiply_group_bf16<AcrossRows>(sum, a, b);
    } else {
      multiply_group_fp16<AcrossRows>(sum, a, b);
    }
  }
};

enum class Wrong {
  kNothing,
  kHalfOfTheBlockWaits,
  kMisalignedMatrix,
  kMisalignedCopy,
  kMisalignedSource,
  kOutsideSharedMemory,
  kWrittenBehind,
  kDifferentInstructions,
  kBarrierWithoutFence,
  kOverwrittenBarrier,
  kInsideTheSwizzle,
  kAcrossInsideTheSwizzle,
  kOperandOutside,
  kTooManyArrivals,
  kDifferentBarriers,
  kPartOfAWarp,
};

struct Mistake {
  struct Params {
    Wrong wrong;
    const char* global;
  };
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 1024;

  template <bool AcrossRows>
  static MIXRANK_DEVICE void multiply_rows(float (&sum)[32], uint64_t rows) {
    group_fence();
    multiply_group_bf16<AcrossRows>(sum, rows, rows);
    group_commit();
    group_wait<0>();
  }

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    auto* barrier = reinterpret_cast<uint64_t*>(shared);
    const bool first = threadIdx.x == 0;
    uint32_t fragment[4];
    const auto is = [&](Wrong wrong) { return p.wrong == wrong; };
    if (is(Wrong::kHalfOfTheBlockWaits) && threadIdx.x < 32) __syncthreads();
    if (is(Wrong::kMisalignedMatrix)) load_matrices(fragment, shared + 8);
    if (is(Wrong::kMisalignedCopy)) copy_async<16>(shared + 8, p.global, 16);
    if (is(Wrong::kMisalignedSource)) copy_async<8>(shared, p.global + 4, 8);
    if (is(Wrong::kOutsideSharedMemory)) copy_async<16>(shared + kSharedBytes, p.global, 16);
    if (is(Wrong::kWrittenBehind)) shared[kSharedBytes] = 0;
    if (is(Wrong::kDifferentInstructions)) {
      if (first) {
        __syncwarp();
      } else {
        load_matrices(fragment, shared);
      }
    }
    if (is(Wrong::kBarrierWithoutFence) && first) {
      barrier_init(barrier, 1);
      const TensorMap map = make_map(p.global, 64, 1, 1, 128, 128, 1);
      load_box(shared, &map, barrier, 0, 0, 0);
    }
    if (is(Wrong::kOverwrittenBarrier) && first) {
      barrier_init(barrier, 1);
      *barrier = 0x5555;
      barrier_arrive(barrier);
    }
    if (is(Wrong::kTooManyArrivals) && first) {
      barrier_init(barrier, 1);
      barrier_expect(barrier, 16);
      barrier_arrive(barrier);
    }
    if (is(Wrong::kDifferentBarriers)) named_barrier(1, threadIdx.x < 32 ? 64 : 128);
    if (is(Wrong::kPartOfAWarp) && threadIdx.x % 64 < 48) named_barrier(1, 96);
    float sum[32] = {};
    if (is(Wrong::kInsideTheSwizzle)) multiply_rows<false>(sum, descriptor(128, 16, 1024));
    if (is(Wrong::kAcrossInsideTheSwizzle)) multiply_rows<true>(sum, descriptor(32, 1024, 1024));
    if (is(Wrong::kOperandOutside)) multiply_rows<false>(sum, descriptor(0, 16, 1024));
  }
};

template <int N, class Call>
void with_group(bool across_rows, bool bf16, const Call& call) {
  if (across_rows && bf16) call.template operator()<Group<N, true, true>>();
  if (across_rows && !bf16) call.template operator()<Group<N, true, false>>();
  if (!across_rows && bf16) call.template operator()<Group<N, false, true>>();
  if (!across_rows && !bf16) call.template operator()<Group<N, false, false>>();
}

}  // namespace

extern "C" {

const char* run_load_box(const uint16_t* in, int64_t cols, int64_t rows, int64_t batches, int64_t row_bytes,
                         uint16_t* out, int x, int y, int z, bool waits, bool late, uint64_t seed) {
  return message_of([&] {
    const TensorMap map = make_map(in, cols, rows, batches, row_bytes, rows * row_bytes, 64);
    launch<LoadBox>(1, 1, 1, {map, out, x, y, z, waits}, {late, seed});
  });
}

const char* run_store_box(const uint16_t* in, int64_t cols, int64_t rows, int64_t batches, int64_t row_bytes,
                          uint16_t* out, int x, int y, int z, int fault, bool late, uint64_t seed) {
  return message_of([&] {
    const TensorMap map = make_map(out, cols, rows, batches, row_bytes, rows * row_bytes, 64);
    launch<StoreBox>(1, 1, 1, {map, in, x, y, z, static_cast<StoreFault>(fault)}, {late, seed});
  });
}

const char* run_pipeline(const int16_t* in, int tiles, int32_t* out, int fault, bool late, uint64_t seed) {
  return message_of([&] {
    const TensorMap map = make_map(in, 64, 64 * tiles, 1, 128, 128 * 64 * tiles, 64);
    launch<Pipeline>(1, 1, 1, {map, out, tiles, static_cast<PipelineFault>(fault)}, {late, seed});
  });
}

// a is [64, 64 * steps] and b [n, 64 * steps], or across rows [64 * steps, 64] and [64 * steps, n].
const char* run_group(const uint16_t* a, const uint16_t* b, float* out, int n, float start, int steps,
                      bool across_rows, bool bf16, int fault, bool late, uint64_t seed) {
  return message_of([&] {
    const auto map = [&](const uint16_t* base, int rows) {
      const int terms = 64 * steps, wide = across_rows ? rows : terms, high = across_rows ? terms : rows;
      return make_map(base, wide, high, 1, wide * 2, int64_t{high} * wide * 2, 64);
    };
    const auto call = [&]<class Kernel>() {
      launch<Kernel>(1, 1, 1, {map(a, 64), map(b, n), out, start, steps, static_cast<GroupFault>(fault)}, {late, seed});
    };
    n == 64 ? with_group<64>(across_rows, bf16, call) : with_group<128>(across_rows, bf16, call);
  });
}

const char* run_mistake(int wrong, const char* global, bool late, uint64_t seed) {
  return message_of([&] { launch<Mistake>(1, 1, 1, {static_cast<Wrong>(wrong), global}, {late, seed}); });
}
}

}  // namespace mixrank
