// Factors in the order in which the tiles read them, behind a header: what lowrank_pack of isa.h writes.
// Included by lowrank_linear_kernel.h alone, for one instruction set.
#pragma once

#include "cpu/lowrank_linear.h"
#include "cpu/merge_columns.h"

namespace mixrank {
namespace {

// Multiply-adds that are worth a thread of their own.
constexpr int64_t kWorkPerThread = 1 << 18;

// Where the parts of packed factors lie, and how they are made. S is the arithmetic of both products.
template <class S, class T>
struct PackedFactors {
  using W = Stored<S, T>;
  static constexpr int64_t kCols = kTileCols<S>;

  using Wide = typename S::Wide;

  const LowrankLinearParams& p;
  const int64_t K = p.x.cols, R = p.down[0].rows + p.down[1].rows;  // R with Q
  const int64_t up_rows = p.up[0].rows, N = up_rows + (p.pivoted ? R : 0);
  const int64_t k_units = ceil_div(K, S::kPack), r_units = ceil_div(R, S::kPack);
  const int64_t down_panels = ceil_div(R, kCols), up_panels = ceil_div(up_rows, kCols);
  const int64_t y_panels = max_of(1, up_panels);  // y has columns even where all of them are the intermediate's
  const int64_t block_width = min_of(p.blocks.size, kCols);  // columns of a panel of one block
  const int64_t block_units = p.blocks.size / S::kPack;

  Arena arena{sizeof(PackedHeader)};
  const int64_t down_at = arena.reserve<W>(down_panels * k_units * kCols);  // [down_panels][k_units][kCols]
  const int64_t up_at = arena.reserve<W>(up_panels * r_units * kCols);      // [up_panels][r_units][kCols]
  // [blocks.count][b / block_width][block_units][block_width]
  const int64_t values_at = arena.reserve<W>(p.blocks.count * p.blocks.size * block_units);
  const int64_t merge_at = arena.reserve<MergePanel>(p.pivoted ? y_panels + 1 : 0);
  const int64_t steps_at =
      arena.reserve<MergeStep<Wide>>(p.pivoted ? MergePlan<Wide>::most_steps(R, N, y_panels) : 0);
  const int64_t bytes = arena.bytes;

  PackedHeader header() const {
    PackedHeader header{{},       kIsa, p.dtype, K, N, p.down[0].rows, p.down[1].rows, p.blocks.size, p.blocks.count,
                        p.sample, p.pivoted, {}};
    memcpy(header.magic, kPackedMagic, sizeof(header.magic));
    return header;
  }

  void pack(void* base) const {
    *static_cast<PackedHeader*>(base) = header();
    if (p.pivoted) {
      const MergePlan<Wide> plan{p.index, R, N, kCols};
      plan.write(y_panels, at_offset<MergePanel>(base, merge_at), at_offset<MergeStep<Wide>>(base, steps_at));
    }
    const int64_t panels = down_panels + up_panels, all = panels + p.blocks.count;
    const int64_t grain = max_of(1, min_of(all, all * kWorkPerThread / (32 * R * (K + N))));
    parallel(all, grain, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        if (j < down_panels) {
          pack_panel<S, T>({p.down, true}, j * kCols, at_offset<W>(base, down_at) + j * k_units * kCols);
        } else if (j < panels) {
          const int64_t panel = j - down_panels;
          pack_panel<S, T>({p.up, false}, panel * kCols, at_offset<W>(base, up_at) + panel * r_units * kCols);
        } else {
          pack_block(j - panels, base);
        }
      }
    });
  }

  void pack_block(int64_t index, void* base) const {
    const int64_t b = p.blocks.size;
    const T* block = static_cast<const T*>(p.blocks.values) + index * b * b;
    W* dst = at_offset<W>(base, values_at) + index * b * block_units;
    for (int64_t n = 0; n < b; n += block_width) {
      transpose_units<S>(block + n * b, b, b, block_width, dst + n * block_units);
    }
  }
};

}  // namespace
}  // namespace mixrank
