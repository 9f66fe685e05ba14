// Small kernels around one instruction each, that test_emulator.py compares with numpy.
#include "emulator/emulator.h"

namespace mixrank {
namespace {

using emulator::launch;
using emulator::message_of;
using emulator::Options;

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

const char* run_shuffles(float* out, int blocks, bool late, uint64_t seed) {
  return message_of([&] { launch<Shuffles>(blocks, 1, 1, {out}, {late, seed}); });
}

const char* run_named_barriers(int* out, bool waits, bool late, uint64_t seed) {
  return message_of([&] { launch<NamedBarriers>(1, 1, 1, {out, waits}, {late, seed}); });
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

uint32_t pack(float low, float high) { return pack_bf16(low, high); }
}

}  // namespace mixrank
