// Codes of 8-bit weights in the order in which the tiles read them, behind a header: what int8_pack of isa.h writes.
// Included by int8_linear_kernel.h alone, for one instruction set.
#pragma once

#include "cpu/int8_linear.h"

namespace mixrank {
namespace {

// Where the parts of packed codes lie, and how they are made. S is Int8, or F32 on codes that are widened one by one.
template <class S>
struct PackedInt8 {
  using Unit = Codes<S::kPack>;
  static constexpr int64_t kCols = kTileCols<S>;
  static constexpr bool kDynamic = std::is_same_v<S, Int8>;

  const Int8LinearParams& p;
  int64_t units[2] = {ceil_div(p.weight[0].cols, S::kPack), ceil_div(p.weight[1].cols, S::kPack)};
  int64_t panels[2] = {ceil_div(p.weight[0].rows, kCols), ceil_div(p.weight[1].rows, kCols)};
  Arena arena{sizeof(PackedInt8Header)};
  // Of each weight: [panels][units][kCols], and the sums of its rows [panels * kCols] where zero points need them.
  int64_t codes_at[2] = {arena.reserve<Unit>(panels[0] * units[0] * kCols),
                         arena.reserve<Unit>(panels[1] * units[1] * kCols)};
  int64_t sums_at[2] = {arena.reserve<int32_t>(Int8::kHasZero && kDynamic ? panels[0] * kCols : 0),
                        arena.reserve<int32_t>(Int8::kHasZero && kDynamic ? panels[1] * kCols : 0)};
  const int64_t bytes = arena.bytes;

  explicit PackedInt8(const Int8LinearParams& params) : p(params) {}

  const Unit* codes(const void* base, int64_t f, int64_t panel) const {
    return at_offset<Unit>(base, codes_at[f]) + panel * units[f] * kCols;
  }
  const int32_t* sums(const void* base, int64_t f, int64_t panel) const {
    return at_offset<int32_t>(base, sums_at[f]) + panel * kCols;
  }

  void pack(void* base) const {
    PackedInt8Header header{{}, kIsa, kDynamic, p.count, 0, {p.weight[0].rows, p.weight[1].rows},
                            {p.weight[0].cols, p.weight[1].cols}, p.sample};
    memcpy(header.magic, kPackedInt8Magic, sizeof(header.magic));
    memcpy(base, &header, sizeof(header));
    for (int64_t f = 0; f < p.count; ++f) {
      const int64_t grain = max_of(1, kWorkPerThread / (kCols * p.weight[f].cols));
      parallel(panels[f], grain, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) pack_panel(f, j, base);
      });
    }
  }

  void pack_panel(int64_t f, int64_t panel, void* base) const {
    const Int8Weight& weight = p.weight[f];
    const int64_t cols = weight.cols, whole = cols / S::kPack;
    Unit* dst = at_offset<Unit>(base, codes_at[f]) + panel * units[f] * kCols;
    memset(dst, 0, units[f] * kCols * sizeof(Unit));
    const int64_t rows = min_of(kCols, weight.rows - panel * kCols);
    const int8_t* first = weight.codes + panel * kCols * cols;
    // Some cache lines of the panel at a time, to which every row adds its share.
    constexpr int64_t kAtATime = 16;
    for (int64_t begin = 0; begin < whole; begin += kAtATime) {
      const int64_t end = min_of(whole, begin + kAtATime);
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t u = begin; u < end; ++u) memcpy(dst + u * kCols + n, first + n * cols + u * S::kPack, S::kPack);
      }
    }
    for (int64_t n = 0; n < rows; ++n) {
      memcpy(dst + whole * kCols + n, first + n * cols + whole * S::kPack, cols - whole * S::kPack);
    }
    if constexpr (Int8::kHasZero && kDynamic) {
      int32_t* sums = at_offset<int32_t>(base, sums_at[f]) + panel * kCols;
      memset(sums, 0, kCols * sizeof(int32_t));
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t k = 0; k < cols; ++k) sums[n] += first[n * cols + k];
      }
    }
  }
};

}  // namespace
}  // namespace mixrank
