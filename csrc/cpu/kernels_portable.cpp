#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/isa.h"
#include "cpu/runtime.h"

namespace mixrank {
namespace {
constexpr int32_t kIsa = 0;
}
}  // namespace mixrank

#include "cpu/simd_int8_portable.h"
// These build on the vector layer above.
#include "cpu/microkernel.h"
#include "cpu/pack.h"
#include "cpu/gram_kernel.h"
#include "cpu/lowrank_linear_kernel.h"
#include "cpu/int8_linear_kernel.h"
#include "cpu/sparse_linear_kernel.h"

namespace mixrank {

const KernelTable kPortableKernels = {
    "portable", kIsa, "6x8", "6x4", false, lowrank_linear_kernel<F32>, lowrank_pack_kernel<F32>, gram_kernel<F32>,
    multiply_add_loop<F32>, nullptr,
    int8_linear_kernel, int8_pack_kernel, multiply_add_loop<Int8>, "plain C++",
    sparse_linear_kernel, sparse_pack_kernel,
};

}  // namespace mixrank
