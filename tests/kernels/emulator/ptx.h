// The instructions of csrc/cuda/ptx.h on the CPU, and what else kernels take from CUDA; emulator.h launches them.
//
// Every function behaves as the PTX ISA defines the instruction that csrc/cuda/ptx.h names beside it, checks what the
// instruction demands, and throws std::runtime_error where a GPU would do something undefined. Instructions of a warp
// wait until its 32 threads have come to the same one; all masks are of whole warps.
#pragma once

#include <stdint.h>
#include <string.h>

#define MIXRANK_DEVICE inline

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the thread that runs; plain variables, since one host thread runs all emulated ones.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace mixrank {

// Three dimensions of 16-bit elements; boxes of 64 columns, `box_rows` rows and one batch, with the 128-byte swizzle.
struct alignas(64) TensorMap {
  char* base;
  int64_t cols, rows, batches;
  int64_t row_bytes, batch_bytes;
  int box_rows;
};

namespace emulator {

enum class Lanes { kIndex, kXor, kDown };

uint32_t shuffle(Lanes lanes, uint32_t mask, uint32_t bits, int operand, int width);
bool vote_any(uint32_t mask, bool predicate);
void sync_warp(uint32_t mask);
void sync_block();
void copy_async(void* shared, const void* global, int bytes, int valid);
void copy_wait(int pending);
void load_matrices(uint32_t* to, const void* row, bool transposed);
void multiply(float* sum, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16);
void multiply_group(float* sum, int count, uint64_t a, uint64_t b, bool across_rows, bool bf16);
void group_wait(int pending);

template <class T>
T shuffle(Lanes lanes, uint32_t mask, T value, int operand, int width) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  bits = shuffle(lanes, mask, bits, operand, width);
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

}  // namespace emulator

char* shared_memory();
uint32_t shared_address(const void* shared);
uint32_t pack_bf16(float low, float high);
float widen_fp16(uint16_t bits);

template <int Bytes>
void copy_async(void* shared, const void* global, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::copy_async(shared, global, Bytes, valid);
}

void copy_commit();

template <int Pending>
void copy_wait() {
  static_assert(Pending >= 0);
  emulator::copy_wait(Pending);
}

inline void load_matrices(uint32_t (&to)[4], const void* row) { emulator::load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { emulator::load_matrices(to, row, true); }

inline void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply(sum, a, b0, b1, true);
}

inline void multiply_fp16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply(sum, a, b0, b1, false);
}

void named_barrier(int id, int threads);

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier);
void barrier_expect(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity);

void prefetch_map(const TensorMap* map);
void load_box(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z);
void store_box(const TensorMap* map, const void* shared, int x, int y, int z);
void store_wait();
void async_fence();

void previous_launch_wait();
void next_launch_start();

int cluster_rank();
void cluster_barrier();
void copy_to_block(const void* shared, uint64_t* barrier, int bytes, int rank);
void barrier_arrive_at(uint64_t* barrier, int rank);
void load_box_to_blocks(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z, uint16_t blocks);

void group_fence();
void group_commit();

template <int Pending>
void group_wait() {
  static_assert(Pending >= 0 && Pending < 8);
  emulator::group_wait(Pending);
}

template <int Count>
void group_fence_sums(float (&)[Count]) {}

template <bool AcrossRows, int Count>
void multiply_group_bf16(float (&sum)[Count], uint64_t a, uint64_t b) {
  static_assert(Count == 32 || Count == 64);
  emulator::multiply_group(sum, Count, a, b, AcrossRows, true);
}

template <bool AcrossRows, int Count>
void multiply_group_fp16(float (&sum)[Count], uint64_t a, uint64_t b) {
  static_assert(Count == 32 || Count == 64);
  emulator::multiply_group(sum, Count, a, b, AcrossRows, false);
}

}  // namespace mixrank

inline void __syncthreads() { mixrank::emulator::sync_block(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { mixrank::emulator::sync_warp(mask); }
inline int __any_sync(uint32_t mask, int predicate) { return mixrank::emulator::vote_any(mask, predicate != 0); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
  return mixrank::emulator::shuffle(mixrank::emulator::Lanes::kIndex, mask, value, lane, width);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32) {
  return mixrank::emulator::shuffle(mixrank::emulator::Lanes::kXor, mask, value, lanes, width);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned lanes, int width = 32) {
  return mixrank::emulator::shuffle(mixrank::emulator::Lanes::kDown, mask, value, static_cast<int>(lanes), width);
}
