// The instructions that the kernels are made of, one function each, named for what it does; the PTX name stands beside it.
//
// The kernels include device.h, which is this file under nvcc and tests/kernels/emulator/ptx.h under a host compiler: the
// same functions, so that the same kernels run without a GPU. Shared addresses are 32-bit offsets into the block's shared
// memory, rows of matrices are 16 bytes. Everything from Hopper on is compiled for sm_90a only.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define MIXRANK_DEVICE __device__ __forceinline__

namespace mixrank {

using TensorMap = CUtensorMap;

// Shared memory of the block, as much as the launch asked for, on a boundary of 1024 bytes.
MIXRANK_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

MIXRANK_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Two floats rounded to the nearest even, the first in the low half.
MIXRANK_DEVICE uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

MIXRANK_DEVICE float widen_fp16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// cp.async: Bytes (4, 8 or 16) from global to shared memory, of which the last Bytes - valid are filled with zeros.
template <int Bytes>
MIXRANK_DEVICE void copy_async(void* shared, const void* global, int valid) {
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(valid)
                 : "memory");
  }
}

// cp.async.commit_group
MIXRANK_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: until at most Pending of this thread's groups are on their way.
template <int Pending>
MIXRANK_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ldmatrix: four 8x8 matrices of 16-bit elements; thread 8 i + r of the warp passes row r of matrix i.
MIXRANK_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// ldmatrix.trans: each matrix transposed.
MIXRANK_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// mma.sync.m16n8k16: sum [16, 8] += a [16, 16] b [16, 8], in fp32.
MIXRANK_DEVICE void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

MIXRANK_DEVICE void multiply_fp16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// bar.sync of `threads` threads of the block, whole warps.
MIXRANK_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// From here on instructions of sm_90a. The passes for other architectures have to parse them, and leave them out.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MIXRANK_SM90(...) asm volatile(__VA_ARGS__)
#else
#define MIXRANK_SM90(...)
#endif

// mbarrier.init
MIXRANK_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  MIXRANK_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Barriers that were initialised are seen by the copy engine after this.
MIXRANK_DEVICE void barrier_init_fence() { MIXRANK_SM90("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// mbarrier.arrive
MIXRANK_DEVICE void barrier_arrive(uint64_t* barrier) {
  MIXRANK_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// mbarrier.arrive.expect_tx: one arrival, and `bytes` that the copy engine has to bring before the phase ends.
MIXRANK_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  MIXRANK_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended.
MIXRANK_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  MIXRANK_SM90(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ended;\n"
      "bra again;\n"
      "ended:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

MIXRANK_DEVICE void prefetch_map(const TensorMap* map) {
  MIXRANK_SM90("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor: the box at (x, y, z), innermost coordinate first, zeros outside the tensor.
MIXRANK_DEVICE void load_box(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
  MIXRANK_SM90(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same the other way; what lies outside the tensor is not written.
MIXRANK_DEVICE void store_box(const TensorMap* map, const void* shared, int x, int y, int z) {
  MIXRANK_SM90("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Until this thread's stores have been read out of shared memory.
MIXRANK_DEVICE void store_wait() {
  MIXRANK_SM90("cp.async.bulk.commit_group;" ::: "memory");
  MIXRANK_SM90("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// What this thread wrote to shared memory is seen by the copy engine and the tensor cores after this and a barrier.
MIXRANK_DEVICE void async_fence() { MIXRANK_SM90("fence.proxy.async.shared::cta;" ::: "memory"); }

// griddepcontrol.wait: until the launch before this one has ended, and its memory is seen.
MIXRANK_DEVICE void previous_launch_wait() { MIXRANK_SM90("griddepcontrol.wait;" ::: "memory"); }

// griddepcontrol.launch_dependents: the next launch may begin when every block has come here or ended.
MIXRANK_DEVICE void next_launch_start() { MIXRANK_SM90("griddepcontrol.launch_dependents;" ::: "memory"); }

// The block's place in its cluster.
MIXRANK_DEVICE int cluster_rank() {
  uint32_t rank = 0;
  MIXRANK_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// barrier.cluster: all threads of all blocks of the cluster.
MIXRANK_DEVICE void cluster_barrier() {
  MIXRANK_SM90("barrier.cluster.arrive.release.aligned;" ::: "memory");
  MIXRANK_SM90("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// cp.async.bulk.shared::cluster.shared::cta: bytes of this block's shared memory to the same place in that of block `rank` of the
// cluster, whose barrier in the place of `barrier` they complete.
MIXRANK_DEVICE void copy_to_block(const void* shared, uint64_t* barrier, int bytes, int rank) {
  MIXRANK_SM90(
      "{\n"
      ".reg .b32 to, told;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 told, %1, %3;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%0], %2, [told];\n"
      "}" ::"r"(shared_address(shared)),
      "r"(shared_address(barrier)), "r"(bytes), "r"(rank)
      : "memory");
}

// mbarrier.arrive on the barrier in the same place of the shared memory of block `rank` of the cluster.
MIXRANK_DEVICE void barrier_arrive_at(uint64_t* barrier, int rank) {
  MIXRANK_SM90(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// load_box to the same place in the shared memory of every block of the cluster whose bit of `blocks` is set, whose barriers in the
// place of `barrier` it completes.
MIXRANK_DEVICE void load_box_to_blocks(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z,
                                       uint16_t blocks) {
  MIXRANK_SM90(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

// wgmma.fence, commit_group and wait_group, by all threads of a warpgroup.
MIXRANK_DEVICE void group_fence() { MIXRANK_SM90("wgmma.fence.sync.aligned;" ::: "memory"); }
MIXRANK_DEVICE void group_commit() { MIXRANK_SM90("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
MIXRANK_DEVICE void group_wait() {
  MIXRANK_SM90("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The compiler may not move a use of the sums across this.
template <int Count>
MIXRANK_DEVICE void group_fence_sums(float (&sum)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

#define MIXRANK_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MIXRANK_32(d, i) MIXRANK_8(d, i), MIXRANK_8(d, i + 8), MIXRANK_8(d, i + 16), MIXRANK_8(d, i + 24)
#define MIXRANK_NAMES_32                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "  \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define MIXRANK_NAMES_64                                                                                            \
  MIXRANK_NAMES_32                                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MIXRANK_GROUP_64(type)                                                                                       \
  MIXRANK_SM90("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" MIXRANK_NAMES_32                     \
               "}, %32, %33, 1, 1, 1, %34, %34;"                                                                     \
               : MIXRANK_32(sum, 0)                                                                                  \
               : "l"(a), "l"(b), "n"(int(AcrossRows)))
#define MIXRANK_GROUP_128(type)                                                                                      \
  MIXRANK_SM90("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" MIXRANK_NAMES_64                    \
               "}, %64, %65, 1, 1, 1, %66, %66;"                                                                     \
               : MIXRANK_32(sum, 0), MIXRANK_32(sum, 32)                                                             \
               : "l"(a), "l"(b), "n"(int(AcrossRows)))

// wgmma.m64nNk16 by the 128 threads of a warpgroup, N = Count * 2: sum [64, N] += a [64, 16] b [16, N], in fp32. Operands
// are descriptors of swizzled tiles, see tiles.h: rows of 16 terms each or, AcrossRows, 16 rows of one term each.
// Thread t of warp w holds what it would hold of N / 8 results of multiply_* for rows 16 w to 16 w + 15.
template <bool AcrossRows, int Count>
MIXRANK_DEVICE void multiply_group_bf16(float (&sum)[Count], uint64_t a, uint64_t b) {
  static_assert(Count == 32 || Count == 64);
  if constexpr (Count == 32) {
    MIXRANK_GROUP_64("bf16");
  } else {
    MIXRANK_GROUP_128("bf16");
  }
}

template <bool AcrossRows, int Count>
MIXRANK_DEVICE void multiply_group_fp16(float (&sum)[Count], uint64_t a, uint64_t b) {
  static_assert(Count == 32 || Count == 64);
  if constexpr (Count == 32) {
    MIXRANK_GROUP_64("f16");
  } else {
    MIXRANK_GROUP_128("f16");
  }
}

}  // namespace mixrank
