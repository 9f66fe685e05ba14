// Small kernels, each around one instruction, that test_emulator.py compares with numpy. Most can leave a step out.
#include "cuda/tiles.h"
#include "emulator/emulator.h"

namespace mixrank {
namespace {

using emulator::launch;
using emulator::message_of;
using emulator::Options;

constexpr int kBoxBytes = 64 * kBoxRowBytes;

// out [16, 16] = a b, with a [16, 16] and b [16, 16] as rows of terms or, transposed, as terms of rows.
struct Multiply {
  struct Params {
    const uint16_t *a, *b;
    float* out;
    bool transposed, bf16;
  };
  static constexpr int kThreads = 32;
  static constexpr int kSharedBytes = 1024;

  static MIXRANK_DEVICE void run(const Params& p) {
    auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
    const int t = static_cast<int>(threadIdx.x);
    for (int i = t; i < 256; i += 32) {
      shared[i] = p.a[i];
      shared[256 + i] = p.b[i];
    }
    __syncwarp();
    const int first = t % 8 + t / 8 % 2 * 8, second = t % 8 + t / 16 * 8;
    uint32_t a[4], b[4];
    if (p.transposed) {
      load_matrices_transposed(a, shared + second * 16 + t / 8 % 2 * 8);
      load_matrices_transposed(b, shared + 256 + first * 16 + t / 16 * 8);
    } else {
      load_matrices(a, shared + first * 16 + t / 16 * 8);
      load_matrices(b, shared + 256 + second * 16 + t / 8 % 2 * 8);
    }
    for (int half = 0; half < 2; ++half) {
      float sum[4] = {};
      if (p.bf16) {
        multiply_bf16(sum, a, b[2 * half], b[2 * half + 1]);
      } else {
        multiply_fp16(sum, a, b[2 * half], b[2 * half + 1]);
      }
      for (int i = 0; i < 4; ++i) p.out[(t / 4 + i / 2 * 8) * 16 + half * 8 + t % 4 * 2 + i % 2] = sum[i];
    }
  }
};

// out [32 * Bytes] = in, of which each thread copies its Bytes, the first valid[t] of them.
template <int Bytes>
struct CopyAsync {
  struct Params {
    const char* in;
    const int* valid;
    char* out;
    bool waits;
  };
  static constexpr int kThreads = 32;
  static constexpr int kSharedBytes = 512;

  static MIXRANK_DEVICE void run(const Params& p) {
    char* shared = shared_memory();
    const int t = static_cast<int>(threadIdx.x);
    copy_async<Bytes>(shared + t * Bytes, p.in + t * Bytes, p.valid[t]);
    copy_commit();
    copy_commit();
    if (p.waits) {
      copy_wait<1>();
    } else {
      copy_wait<2>();
    }
    __syncthreads();
    memcpy(p.out + (31 - t) * Bytes, shared + (31 - t) * Bytes, Bytes);
  }
};

// out [128, 8] = of each thread t: what shuffles bring it, its own value being t.
struct Shuffles {
  struct Params {
    float* out;
  };
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;

  static MIXRANK_DEVICE void run(const Params& p) {
    const int t = static_cast<int>(threadIdx.x);
    float* out = p.out + t * 8;
    const auto value = static_cast<float>(t);
    out[0] = __shfl_sync(0xffffffffu, value, 3);
    out[1] = __shfl_sync(0xffffffffu, value, 9, 8);
    out[2] = __shfl_xor_sync(0xffffffffu, value, 5);
    out[3] = __shfl_xor_sync(0xffffffffu, value, 8, 8);
    out[4] = __shfl_down_sync(0xffffffffu, value, 4);
    out[5] = static_cast<float>(__shfl_down_sync(0xffffffffu, t, 3, 8));
    out[6] = static_cast<float>(__any_sync(0xffffffffu, t == 40));
    out[7] = static_cast<float>(__any_sync(0xffffffffu, t >= 0));
  }
};

// out [2, 64]: each half of the block sums up its threads through a barrier of its own.
struct NamedBarriers {
  struct Params {
    int* out;
    bool waits;
  };
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 512;

  static MIXRANK_DEVICE void run(const Params& p) {
    auto* shared = reinterpret_cast<int*>(shared_memory());
    const int t = static_cast<int>(threadIdx.x), half = t / 64;
    shared[t] = t;
    if (p.waits) named_barrier(1 + half, 64);
    __syncwarp();
    int sum = 0;
    for (int i = 0; i < 64; ++i) sum += shared[half * 64 + i];
    p.out[t] = sum;
  }
};

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

// out [blocks, 64]: values that the first launch writes, which the second one, overlapping it, adds one to.
MIXRANK_DEVICE int global_index() {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  return static_cast<int>(block * blockDim.x + threadIdx.x);
}

struct Write {
  struct Params {
    int* out;
  };
  static constexpr int kThreads = 64;
  static constexpr int kSharedBytes = 0;

  static MIXRANK_DEVICE void run(const Params& p) {
    next_launch_start();
    p.out[global_index()] = global_index();
  }
};

enum class LaunchFault { kNone, kNoWait, kReadBefore };

struct AddOne {
  struct Params {
    const int* in;
    int* out;
    LaunchFault fault;
  };
  static constexpr int kThreads = 64;
  static constexpr int kSharedBytes = 0;

  static MIXRANK_DEVICE void run(const Params& p) {
    const int i = global_index(), early = p.in[i];
    if (p.fault != LaunchFault::kNoWait) previous_launch_wait();
    p.out[i] = 1 + (p.fault == LaunchFault::kReadBefore ? early : p.in[i]);
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

const char* run_multiply(const uint16_t* a, const uint16_t* b, float* out, bool transposed, bool bf16, bool late,
                         uint64_t seed) {
  return message_of([&] { launch<Multiply>(1, 1, 1, {a, b, out, transposed, bf16}, {late, seed}); });
}

const char* run_copy_async(int bytes, const char* in, const int* valid, char* out, bool waits, bool late,
                           uint64_t seed) {
  return message_of([&] {
    const Options options{late, seed};
    if (bytes == 4) launch<CopyAsync<4>>(1, 1, 1, {in, valid, out, waits}, options);
    if (bytes == 8) launch<CopyAsync<8>>(1, 1, 1, {in, valid, out, waits}, options);
    if (bytes == 16) launch<CopyAsync<16>>(1, 1, 1, {in, valid, out, waits}, options);
  });
}

const char* run_shuffles(float* out, bool late, uint64_t seed) {
  return message_of([&] { launch<Shuffles>(1, 1, 1, {out}, {late, seed}); });
}

const char* run_named_barriers(int* out, bool waits, bool late, uint64_t seed) {
  return message_of([&] { launch<NamedBarriers>(1, 1, 1, {out, waits}, {late, seed}); });
}

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

const char* run_dependent(int* between, int* out, int fault, bool late, uint64_t seed) {
  return message_of([&] {
    emulator::Queue queue({late, seed});
    queue.launch<Write>(3, 2, 2, {between}, false);
    queue.launch<AddOne>(3, 2, 2, {between, out, static_cast<LaunchFault>(fault)}, true);
    queue.finish();
  });
}

const char* check_map(int64_t base, int64_t cols, int64_t rows, int64_t batches, int64_t row_bytes,
                      int64_t batch_bytes, int box_rows) {
  return message_of([&] {
    make_map(reinterpret_cast<const void*>(base), cols, rows, batches, row_bytes, batch_bytes, box_rows);
  });
}

uint32_t pack(float low, float high, bool bf16) { return bf16 ? pack_bf16(low, high) : pack_fp16(low, high); }
}

}  // namespace mixrank
