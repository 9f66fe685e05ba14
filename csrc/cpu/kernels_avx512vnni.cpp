#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/isa.h"
#include "cpu/runtime.h"

// After the standard headers, so that their functions are not compiled for a processor that may be missing.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif

#define MIXRANK_VNNI

namespace mixrank {
namespace {
constexpr int32_t kIsa = 4;
}
}  // namespace mixrank

#include "cpu/simd_int8_avx512.h"
// These build on the vector layer above.
#include "cpu/microkernel.h"
#include "cpu/pack.h"
#include "cpu/gram_kernel.h"
#include "cpu/lowrank_linear_kernel.h"
#include "cpu/int8_linear_kernel.h"
#include "cpu/sparse_linear_kernel.h"

namespace mixrank {

const KernelTable kAvx512VnniKernels = {
    "avx512vnni", kIsa, "12x32", "12x16", false, lowrank_linear_kernel<F32>, lowrank_pack_kernel<F32>, gram_kernel<F32>,
    multiply_add_loop<F32>, nullptr,
    int8_linear_kernel, int8_pack_kernel, multiply_add_loop<Int8>, "vpdpbusd",
    sparse_linear_kernel, sparse_pack_kernel,
};

}  // namespace mixrank

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
