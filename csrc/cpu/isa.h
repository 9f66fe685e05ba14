// The instruction sets that kernels are compiled for, and the choice among them at run time.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cpu/gram.h"
#include "cpu/int8_linear.h"
#include "cpu/lowrank_linear.h"
#include "cpu/sparse_linear.h"

namespace mixrank {

// The kernels of one instruction set, compiled from the same sources as those of every other.
struct KernelTable {
  const char* isa;
  int32_t isa_id;          // marks what was packed for these kernels
  const char* float_tile;  // rows x columns of the register tile, as text
  const char* double_tile;
  bool bfloat_pairs;  // bf16 products by vdpbf16ps
  void (*lowrank_linear)(const LowrankLinearParams&);
  // Writes the packed factors where `packed` is not null, and returns how many bytes they take.
  int64_t (*lowrank_pack)(const LowrankLinearParams&, void* packed);
  void (*gram_accumulate)(const GramParams&);
  // Loops of multiply-adds in registers, the ceiling of any kernel: each returns the floating-point operations done.
  int64_t (*float_loop)(int64_t steps);
  int64_t (*bfloat_loop)(int64_t steps);  // null without bfloat_pairs
  void (*int8_linear)(const Int8LinearParams&);
  int64_t (*int8_pack)(const Int8LinearParams&, void* packed);  // as lowrank_pack
  int64_t (*int8_loop)(int64_t steps);
  const char* int8_products;  // what multiplies codes, as text
  void (*sparse_linear)(const SparseLinearParams&);
  int64_t (*sparse_pack)(const SparseLinearParams&, void* packed);  // as lowrank_pack
};

extern const KernelTable kPortableKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512VnniKernels;
extern const KernelTable kAvx512Bf16Kernels;
#endif

// What the processor offers and the operating system lets programs use.
std::vector<std::pair<std::string, bool>> cpu_features();
std::vector<std::string> compiled_isas();   // best first
std::vector<std::string> supported_isas();  // best first: compiled in, and this machine can run it

// The kernels in use by this process.
const KernelTable& kernels();
// "auto" restores the best. Throws std::invalid_argument for any name outside supported_isas().
void set_isa(const std::string& name);

}  // namespace mixrank
