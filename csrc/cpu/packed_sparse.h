// A sparse weight and its factors in the order in which the tiles read them, behind a header: what sparse_pack of isa.h
// writes. Included by sparse_linear_kernel.h alone, for one instruction set.
//
// S is cut into groups of rows and chunks of features. The entries of one group and chunk lie together: rows in the
// order of their number of entries, so that the loops over them mostly end where the processor expects it.
#pragma once

#include "cpu/sparse_linear.h"

namespace mixrank {
namespace {

// Vectors of tokens in a tile: a broadcast and the loop around it are shared by as many multiply-adds.
constexpr int kTokenVecs = 8;
// Bytes of a panel of x that stays in the L1 cache.
constexpr int64_t kPanelOfX = 32 << 10;
// Features of a panel; not more than 128, so that a count of them fits a byte.
template <class S>
constexpr int64_t kFitting = kPanelOfX / (kTokenVecs * sizeof(typename S::V));
template <class S>
constexpr int64_t kChunk = kFitting<S> < 128 ? kFitting<S> : 128;
// Rows of S that are sorted together, and the least that a thread takes.
constexpr int64_t kGroup = 128;

struct SparseRow {
  uint8_t row;  // of the group
  uint8_t count;
};
static_assert(kGroup <= 256, "a row fits a byte, and so does a count of at most 128");

// Where the parts of packed weights lie, and how they are made.
template <class S, class T>
struct PackedSparse {
  using Acc = typename S::Acc;
  // An odd number of cache lines keeps the rows of a factor out of each other's cache sets.
  static constexpr int64_t kLineUnits = kLine / sizeof(Acc);
  static constexpr int64_t kDownRow = kChunk<S> + kLineUnits;
  // Bytes of a vector of tokens of one feature: what places count.
  static constexpr int64_t kStep = sizeof(typename S::V);
  static_assert(kChunk<S> * kStep <= 65536, "a place fits 16 bits");

  const SparseLinearParams& p;
  const int64_t K = p.x.cols, N = p.N, R = p.down.rows;
  const int64_t mask_row = ceil_div(K, 8);
  // Of the mask's bytes alone: without factors, nothing else tells K while packing.
  const int64_t chunks = ceil_div(8 * mask_row, kChunk<S>), groups = ceil_div(N, kGroup);
  const int64_t width = round_up(ceil_div(8 * mask_row, chunks), 16);  // of a chunk
  const int64_t up_row = (ceil_div(R, kLineUnits) | 1) * kLineUnits;

  Arena arena{sizeof(PackedSparseHeader)};
  const int64_t starts_at = arena.reserve<int64_t>(groups * chunks);           // [groups][chunks], the first entry
  const int64_t rows_at = arena.reserve<SparseRow>(groups * chunks * kGroup);  // [groups][chunks][kGroup]
  const int64_t places_at = arena.reserve<uint16_t>(p.count);                  // feature of the chunk, times kStep
  const int64_t values_at = arena.reserve<Acc>(p.count);
  const int64_t down_at = arena.reserve<Acc>(chunks * R * kDownRow);  // [chunks][R][kDownRow]
  const int64_t up_at = arena.reserve<Acc>(R > 0 ? N * up_row : 0);   // [N][up_row]
  const int64_t bytes = arena.bytes;

  int64_t rows_of_group(int64_t group) const { return min_of(kGroup, N - group * kGroup); }
  int64_t features_of_chunk(int64_t chunk) const { return min_of(width, K - chunk * width); }

  void pack(void* base) const {
    PackedSparseHeader header{{}, kIsa, p.dtype, mask_row, N, R, p.count, p.sample, p.scale != nullptr, {}};
    memcpy(header.magic, kPackedSparseMagic, sizeof(header.magic));
    memcpy(base, &header, sizeof(header));
    // The first entry of a group is known by counting those before it.
    auto* starts = at_offset<int64_t>(base, starts_at);
    for (int64_t group = 0, count = 0; group < groups; ++group) {
      starts[group * chunks] = count;
      count += bits(p.mask + group * kGroup * mask_row, rows_of_group(group) * mask_row);
    }
    const int64_t grain = max_of(1, groups * kWorkPerThread / max_of(1, 8 * (p.count + R * (K + N))));
    parallel(groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        pack_group(group, base);
        pack_up(group, base);
      }
    });
    parallel(R, ceil_div(R, groups), [&](int64_t begin, int64_t end) { pack_down(begin, end, base); });
  }

  static int64_t bits(const uint8_t* bytes, int64_t count) {
    int64_t set = 0, i = 0;
    for (; i + 8 <= count; i += 8) {
      uint64_t word;
      memcpy(&word, bytes + i, sizeof(word));
      set += __builtin_popcountll(word);
    }
    for (; i < count; ++i) set += __builtin_popcountll(bytes[i]);
    return set;
  }

  void pack_group(int64_t group, void* base) const {
    const int64_t rows = rows_of_group(group);
    const uint8_t* mask = p.mask + group * kGroup * mask_row;
    auto* starts = at_offset<int64_t>(base, starts_at) + group * chunks;
    auto* places = at_offset<uint16_t>(base, places_at);
    auto* values = at_offset<Acc>(base, values_at);
    int64_t entry = starts[0], next[kGroup];  // of each row, the value that follows those taken
    for (int64_t n = 0, value = entry; n < rows; ++n) {
      next[n] = value;
      value += bits(mask + n * mask_row, mask_row);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * width / 8, length = ceil_div(features_of_chunk(chunk), 8);
      auto* order = at_offset<SparseRow>(base, rows_at) + (group * chunks + chunk) * kGroup;
      memset(order, 0, kGroup * sizeof(SparseRow));
      sort_rows(mask + first, length, rows, order);
      starts[chunk] = entry;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = order[i].row;
        for (int64_t byte = 0; byte < length; ++byte) {
          for (unsigned rest = mask[n * mask_row + first + byte]; rest != 0; rest &= rest - 1, ++entry) {
            places[entry] = static_cast<uint16_t>((byte * 8 + __builtin_ctz(rest)) * kStep);
            values[entry] = value_of(group * kGroup + n, next[n]++);
          }
        }
      }
    }
  }

  // The stored entry `i`, which is in row n.
  Acc value_of(int64_t n, int64_t i) const {
    if (p.scale) return static_cast<Acc>(static_cast<const int8_t*>(p.values)[i]) * p.scale[n];
    return widen(static_cast<const T*>(p.values)[i]);
  }

  // `count` elements of a factor's row from `col` on, and zeros up to `room`.
  void put_row(const MatrixView& factor, const float* scale, int64_t row, int64_t col, int64_t count, int64_t room,
               Acc* dst) const {
    if (scale) {
      const int8_t* codes = element_of<int8_t>(factor, row, col);
      for (int64_t i = 0; i < count; ++i) dst[i] = static_cast<Acc>(codes[i]) * scale[row];
    } else {
      widen_row<S>(element_of<T>(factor, row, col), factor.col_stride, count, dst);
    }
    memset(dst + count, 0, (room - count) * sizeof(Acc));
  }

  // By counting: rows of equal count keep their order.
  void sort_rows(const uint8_t* mask, int64_t length, int64_t rows, SparseRow* order) const {
    int64_t below[kChunk<S> + 2] = {};
    uint8_t counts[kGroup];
    for (int64_t n = 0; n < rows; ++n) {
      counts[n] = static_cast<uint8_t>(bits(mask + n * mask_row, length));
      ++below[counts[n] + 1];
    }
    for (int64_t count = 1; count <= kChunk<S>; ++count) below[count] += below[count - 1];
    for (int64_t n = 0; n < rows; ++n) order[below[counts[n]]++] = {static_cast<uint8_t>(n), counts[n]};
  }

  void pack_up(int64_t group, void* base) const {
    for (int64_t n = group * kGroup; R > 0 && n < group * kGroup + rows_of_group(group); ++n) {
      put_row(p.up, p.up_scale, n, 0, R, up_row, at_offset<Acc>(base, up_at) + n * up_row);
    }
  }

  void pack_down(int64_t begin, int64_t end, void* base) const {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t features = features_of_chunk(chunk);
      for (int64_t r = begin; r < end; ++r) {
        Acc* dst = at_offset<Acc>(base, down_at) + (chunk * R + r) * kDownRow;
        put_row(p.down, p.down_scale, r, chunk * width, features, kDownRow, dst);
      }
    }
  }
};

}  // namespace
}  // namespace mixrank
