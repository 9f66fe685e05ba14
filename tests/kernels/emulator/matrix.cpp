// Instructions of a warp or a warpgroup: shuffles, ldmatrix, mma.sync, wgmma. Sections are those of the PTX ISA 9.2.
// Sums are added up in fp32 term by term; tensor cores add in another order and round otherwise.
#include <algorithm>

#include "cpu/scalar.h"
#include "emulator/machine.h"

namespace mixrank::emulator {
namespace {

constexpr int kTerms = 16;  // of one instruction
constexpr int kGroupRows = 64;

float widen_bits(uint16_t bits, bool bf16) { return bf16 ? widen(BFloat{bits}) : widen(Half{bits}); }

void widen_pair(uint32_t pair, bool bf16, float* low, float* high) {
  *low = widen_bits(static_cast<uint16_t>(pair), bf16);
  *high = widen_bits(static_cast<uint16_t>(pair >> 16), bf16);
}

void require_whole_warp(uint32_t mask, const char* instruction) {
  if (mask != kWholeWarp) machine().fail(std::string(instruction) + " got a mask of less than the warp");
}

struct Shuffle {
  Lanes lanes;
  uint32_t bits;
  int operand, width;
  uint32_t* to;
};

// CUDA C++ Programming Guide, "Warp Shuffle Functions": segments of `width` lanes; beyond its segment a lane reads
// itself, but by XOR it reads earlier segments.
int source_lane(const Shuffle& shuffle, int lane) {
  const int begin = lane & ~(shuffle.width - 1);
  switch (shuffle.lanes) {
    case Lanes::kIndex:
      return begin + (shuffle.operand & (shuffle.width - 1));
    case Lanes::kXor: {
      const int source = lane ^ shuffle.operand;
      return source < begin + shuffle.width ? source : lane;
    }
    case Lanes::kDown: {
      const int64_t source = int64_t{lane} + static_cast<uint32_t>(shuffle.operand);
      return source < begin + shuffle.width ? static_cast<int>(source) : lane;
    }
  }
  return lane;
}

struct Vote {
  bool predicate;
  bool* any;
};

struct Rows {
  const char* row;
  uint32_t* to;
  bool transposed;
};

// Section 9.7.14.5.15, ldmatrix: thread 8 i + r has the address of row r of matrix i; of register i, thread t gets the
// elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4, or of column t / 4 when transposed.
void load(const Rows* const* operands) {
  for (int i = 0; i < 4; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) memcpy(matrix[row], operands[8 * i + row]->row, sizeof(matrix[row]));
    for (int t = 0; t < kWarp; ++t) {
      const int line = t / 4, first = t % 4 * 2;
      const bool transposed = operands[t]->transposed;
      const uint32_t low = transposed ? matrix[first][line] : matrix[line][first];
      const uint32_t high = transposed ? matrix[first + 1][line] : matrix[line][first + 1];
      operands[t]->to[i] = low | high << 16;
    }
  }
}

struct Product {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
  bool bf16;
};

// Section 9.7.14.5.8, matrix fragments for mma.m16n8k16: with group g = t / 4 and p = 2 (t % 4), thread t holds
// a0 to a3 = rows g, g + 8, g, g + 8 of A at terms p, p, p + 8, p + 8 and the next ones,
// b0, b1 = terms p, p + 8 and the next ones of column g of B, and
// c0 to c3 = rows g, g, g + 8, g + 8 of C at columns p, p + 1, p, p + 1.
void multiply(const Product* const* operands) {
  float a[16][kTerms], b[kTerms][8], sum[16][8] = {};
  const bool bf16 = operands[0]->bf16;
  for (int t = 0; t < kWarp; ++t) {
    const int g = t / 4, p = t % 4 * 2;
    const Product& of = *operands[t];
    for (int i = 0; i < 4; ++i) {
      float* to = &a[g + i % 2 * 8][p + i / 2 * 8];
      widen_pair(of.a[i], bf16, to, to + 1);
    }
    for (int i = 0; i < 2; ++i) widen_pair(of.b[i], bf16, &b[p + i * 8][g], &b[p + i * 8 + 1][g]);
    for (int i = 0; i < 4; ++i) sum[g + i / 2 * 8][p + i % 2] = of.sum[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int term = 0; term < kTerms; ++term) {
      for (int col = 0; col < 8; ++col) sum[row][col] += a[row][term] * b[term][col];
    }
  }
  for (int t = 0; t < kWarp; ++t) {
    const int g = t / 4, p = t % 4 * 2;
    for (int i = 0; i < 4; ++i) operands[t]->sum[i] = sum[g + i / 2 * 8][p + i % 2];
  }
}

struct Descriptor {
  uint32_t address, leading, stride;
};

// Section 9.7.15.5.1.2, matrix descriptor format: bits 0-13 start address, 16-29 leading dimension byte offset, 32-45
// stride dimension byte offset, all without their four lowest bits; 49-51 base offset; 62-63 swizzling, 1 of 128 bytes.
// The base offset is 0 where the pattern of the swizzle begins at a multiple of 1024 bytes.
Descriptor decode(const Machine& m, uint64_t bits, bool across_rows) {
  constexpr uint64_t kUsed = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
  if ((bits & ~kUsed) != 0) m.fail("a descriptor of wgmma has bits other than addresses, offsets and swizzle");
  if (bits >> 62 != 1) m.fail("a descriptor of wgmma is not of the 128-byte swizzle, the only one emulated");
  const auto field = [bits](int first) { return static_cast<uint32_t>(bits >> first & 0x3fff) << 4; };
  const Descriptor result{field(0), field(16), field(32)};
  // Along the terms an operand may begin at a later one of its 128 bytes; along the rows it may not.
  const uint32_t within = result.address % 1024;
  if (across_rows ? within != 0 : within > 96) {
    m.fail("a descriptor of wgmma begins at byte " + std::to_string(result.address) +
           " of shared memory, inside the pattern of the swizzle");
  }
  if (result.stride % 1024 != 0 || (across_rows && result.leading % 1024 != 0)) {
    m.fail("a descriptor of wgmma has offsets that are not multiples of 1024 bytes");
  }
  return result;
}

// Section 9.7.15.5.1.2, shared memory matrix layout, and the canonical layouts of CUTLASS (make_gmma_desc in
// mma_traits_sm90_gmma.hpp), in elements of 16 bits and before the swizzle:
// K-major ((8, m), (8, 2)) : ((64, stride), (1, 8)) and, across rows, MN-major ((64, m), (8, 2)) : ((1, leading), (64,
// stride)). Either way eight elements that follow each other are 16 bytes that the swizzle leaves together.
void load_operand(const Machine& m, uint64_t bits, bool across_rows, bool bf16, int rows, float* to) {
  const Descriptor from = decode(m, bits, across_rows);
  const auto chunk = [&](uint32_t address, uint16_t (&values)[8]) {
    memcpy(values, m.seen(swizzled(address), sizeof(values)), sizeof(values));
  };
  uint16_t values[8];
  if (across_rows) {
    for (int term = 0; term < kTerms; ++term) {
      for (int row = 0; row < rows; row += 8) {
        chunk(from.address + row / 64 * from.leading + term / 8 * from.stride + term % 8 * 128 + row % 64 * 2, values);
        for (int i = 0; i < 8; ++i) to[term * rows + row + i] = widen_bits(values[i], bf16);
      }
    }
    return;
  }
  for (int row = 0; row < rows; ++row) {
    for (int term = 0; term < kTerms; term += 8) {
      chunk(from.address + row / 8 * from.stride + row % 8 * 128 + term * 2, values);
      for (int i = 0; i < 8; ++i) to[(term + i) * rows + row] = widen_bits(values[i], bf16);
    }
  }
}

struct GroupOperands {
  float* sum;
  int count;
  uint64_t a, b;
  bool across_rows, bf16;
};

bool same(const GroupOperands& x, const GroupProduct& y) {
  return x.a == y.a && x.b == y.b && x.count == y.count && x.across_rows == y.across_rows && x.bf16 == y.bf16;
}

// The sums at these registers, with one more product on its way to them.
void begin_sums(Machine& m, Thread& thread, float* registers, int count, bool fenced) {
  auto found = std::find_if(thread.sums.begin(), thread.sums.end(),
                            [&](const Sums& sums) { return sums.registers == registers; });
  const bool known = found != thread.sums.end() && found->values.size() == static_cast<size_t>(count);
  if (found == thread.sums.end()) found = thread.sums.insert(found, {registers, {}, 0});
  if (found->pending++ > 0) {
    if (!known) m.fail("products of different shapes were issued for the same sums");
    return;
  }
  if (!fenced && !(known && memcmp(found->values.data(), registers, count * sizeof(float)) == 0)) {
    m.fail("sums were changed and given to wgmma without a group_fence in between");
  }
  found->values.assign(registers, registers + count);
  if (m.options.late) memset(registers, 0xFF, count * sizeof(float));
}

void issue(Machine& m, const GroupOperands* const* operands) {
  Warp& warp = m.warp();
  const int index = m.thread().index / kWarp, first = index / 4 * 4 * kWarp, of_group = index % 4;
  if (first + 4 * kWarp > m.launch.threads) m.fail("wgmma was called by a warp that is not one of four");
  Warpgroup& group = m.groups[index / 4];
  const GroupOperands& lane = *operands[0];
  if (group.products.size() == warp.issued) {
    group.products.emplace_back(
        new GroupProduct{lane.a, lane.b, lane.count, lane.across_rows, lane.bf16, 0, {}, {}, {}});
  }
  GroupProduct& product = *group.products[warp.issued++];
  for (int i = 0; i < kWarp; ++i) {
    if (!same(*operands[i], product)) m.fail("the threads of a warpgroup gave wgmma different operands");
    product.sums[of_group * kWarp + i] = operands[i]->sum;
    begin_sums(m, m.threads[index * kWarp + i], operands[i]->sum, lane.count, warp.fenced);
  }
  if (++product.issued < 4) return;
  if (!m.options.late) {
    m.compute(product);
    for (int i = 0; i < 4; ++i) m.add(product, i, first);
  }
  for (Thread* thread : group.waiting) m.wake(*thread);
  group.waiting.clear();
}

}  // namespace

void Machine::compute(GroupProduct& product) const {
  const int cols = product.count * 2;
  std::vector<float> a(kTerms * kGroupRows), b(kTerms * cols);
  load_operand(*this, product.a, product.across_rows, product.bf16, kGroupRows, a.data());
  load_operand(*this, product.b, product.across_rows, product.bf16, cols, b.data());
  product.values.assign(kGroupRows * cols, 0.0f);
  for (int row = 0; row < kGroupRows; ++row) {
    float* sum = product.values.data() + row * cols;
    for (int term = 0; term < kTerms; ++term) {
      const float factor = a[term * kGroupRows + row];
      const float* terms = b.data() + term * cols;
      for (int col = 0; col < cols; ++col) sum[col] += factor * terms[col];
    }
  }
}

// Section 9.7.15.5.1.1.1, accumulator D of wgmma.mma_async.m64nNk16: warp w of the group holds rows 16 w to 16 w + 15,
// and of each eight columns what it would hold of mma.m16n8k16's C.
void Machine::add(GroupProduct& product, int warp_of_group, int first_thread) {
  if (product.added[warp_of_group]) return;
  product.added[warp_of_group] = true;
  const int cols = product.count * 2;
  for (int t = 0; t < kWarp; ++t) {
    const int of_group = warp_of_group * kWarp + t;
    auto& all = threads[first_thread + of_group].sums;
    Sums& sums = *std::find_if(all.begin(), all.end(),
                               [&](const Sums& of) { return of.registers == product.sums[of_group]; });
    for (int i = 0; i < product.count; ++i) {
      const int row = warp_of_group * 16 + t / 4 + i % 4 / 2 * 8, col = i / 4 * 8 + t % 4 * 2 + i % 2;
      sums.values[i] += product.values[row * cols + col];
    }
    if (--sums.pending == 0) memcpy(sums.registers, sums.values.data(), product.count * sizeof(float));
  }
  if (std::all_of(product.added, product.added + 4, [](bool added) { return added; })) product.values = {};
}

// Section 9.7.15.7, wgmma.wait_group: all but the `pending` groups committed last have ended.
void Machine::wait_for_products(int pending) {
  Warp& warp = this->warp();
  warp.fenced = false;
  if (warp.committed.size() <= static_cast<size_t>(pending)) return;
  const size_t end = warp.committed[warp.committed.size() - 1 - pending];
  warp.committed.erase(warp.committed.begin(), warp.committed.end() - pending);
  const int index = current->index / kWarp;
  Warpgroup& group = groups[index / 4];
  for (; warp.added < end; ++warp.added) {
    GroupProduct& product = *group.products[warp.added];
    while (product.issued < 4) {
      group.waiting.push_back(current);
      wait("group_wait", " for the other warps of the group to issue the product");
    }
    if (product.values.empty() && !product.added[index % 4]) compute(product);
    add(product, index % 4, index / 4 * 4 * kWarp);
  }
}

uint32_t shuffle(Lanes lanes, uint32_t mask, uint32_t bits, int operand, int width) {
  Machine& m = machine();
  require_whole_warp(mask, "a shuffle");
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    m.fail("width was " + std::to_string(width) + ", but must be a power of two up to 32");
  }
  uint32_t result;
  const Shuffle operands{lanes, bits, operand, width, &result};
  constexpr const char* kNames[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync"};
  m.collective(kNames[static_cast<int>(lanes)], operands, [](const Shuffle* const* all) {
    for (int i = 0; i < kWarp; ++i) *all[i]->to = all[source_lane(*all[i], i)]->bits;
  });
  return result;
}

bool vote_any(uint32_t mask, bool predicate) {
  require_whole_warp(mask, "__any_sync");
  bool any;
  machine().collective("__any_sync", Vote{predicate, &any}, [](const Vote* const* all) {
    const bool result = std::any_of(all, all + kWarp, [](const Vote* vote) { return vote->predicate; });
    for (int i = 0; i < kWarp; ++i) *all[i]->any = result;
  });
  return any;
}

void sync_warp(uint32_t mask) {
  require_whole_warp(mask, "__syncwarp");
  machine().collective("__syncwarp", 0, [](const int* const*) {});
}

void load_matrices(uint32_t* to, const void* row, bool transposed) {
  Machine& m = machine();
  const char* name = transposed ? "load_matrices_transposed" : "load_matrices";
  m.address(row, name, 16, 16);
  m.collective(name, Rows{static_cast<const char*>(row), to, transposed}, load);
}

void multiply(float* sum, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16) {
  machine().collective(bf16 ? "multiply_bf16" : "multiply_fp16", Product{sum, a, {b0, b1}, bf16},
                       [](const Product* const* all) { multiply(all); });
}

void multiply_group(float* sum, int count, uint64_t a, uint64_t b, bool across_rows, bool bf16) {
  Machine& m = machine();
  m.collective(bf16 ? "multiply_group_bf16" : "multiply_group_fp16", GroupOperands{sum, count, a, b, across_rows, bf16},
               [&m](const GroupOperands* const* all) { issue(m, all); });
}

void group_wait(int pending) {
  Machine& m = machine();
  m.collective("group_wait", pending, [&m, pending](const int* const*) { m.wait_for_products(pending); });
}

}  // namespace mixrank::emulator

namespace mixrank {

using emulator::machine;

uint32_t pack_bf16(float low, float high) {
  BFloat pair[2];
  narrow(low, &pair[0]);
  narrow(high, &pair[1]);
  return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
}
float widen_fp16(uint16_t bits) { return widen(Half{bits}); }

void group_fence() {
  auto& m = machine();
  m.collective("group_fence", 0, [&m](const int* const*) { m.warp().fenced = true; });
}

void group_commit() {
  auto& m = machine();
  m.collective("group_commit", 0, [&m](const int* const*) { m.warp().committed.push_back(m.warp().issued); });
}

}  // namespace mixrank
