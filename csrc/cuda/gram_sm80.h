// Tiles of (w x)^T z by mma.sync and cp.async, for every architecture from sm_80 on: see GramParams.
//
// A block sums one tile of 128 x 128 over the rows of one split. The terms of the product are rows (tokens), of which x and z
// hold neighbours apart: tiles are kDepth rows of 128 columns as they lie in memory, and are transposed on the way into registers. Any
// shape, any row stride, any alignment of elements.
//
// Source is the type in memory. With TermsLeft and TermsRight 1 it is multiplied as it is; else both operands are split into
// bf16 terms, after the left one was weighted in fp32.
#pragma once

#include "cuda/gram_tiles.h"
#include "cuda/operands.h"

namespace mixrank {

template <class SourceType, bool Weighted, int TermsLeft, int TermsRight>
struct GramSm80 {
  using Params = GramParams;
  using Source = SourceType;
  using Element = typename Source::Element;

  static constexpr bool kNarrow = sizeof(Element) == 2;
  static constexpr int kDepth = kNarrow ? 64 : 16;
  static constexpr int kBoxBytes = kDepth * kBoxRowBytes;          // narrow: two boxes of 64 columns
  static constexpr int kRowBytes = (kGramTile + 8) * 4;            // wide: 8 floats of padding keep the banks apart
  static constexpr int kTileBytes = kNarrow ? 2 * kBoxBytes : kDepth * kRowBytes;
  static constexpr int kStages = kNarrow ? 3 : 4;
  static constexpr int kWarpRows = 2, kWarpCols = 4;
  static constexpr int kArchitecture = 80;
  static constexpr int kThreads = kWarpRows * kWarpCols * 32;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = kStages * 2 * kTileBytes;
  static constexpr int kStepsAtOnce = Weighted ? 1 : kDepth / 16;  // weighted terms take the registers of a second step
  static constexpr int kPartsLeft = kPartsOf<TermsLeft, TermsRight>, kPartsRight = kPartsOf<TermsRight, TermsLeft>;
  static constexpr int kRowTiles = kGramTile / kWarpRows / 16, kColTiles = kGramTile / kWarpCols / 8;
  static_assert(kNarrow || (TermsLeft > 1 && TermsRight > 1), "fp32 is multiplied in terms of bf16");
  static_assert(!Weighted || TermsLeft > 1, "a weighted value has more bits than its source");

  // A product of the operands' terms.
  struct Terms {
    static MIXRANK_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
      if constexpr (TermsLeft == 1 && TermsRight == 1) {
        Source::multiply(sum, a, b);
      } else {
        multiply_bf16(sum, a, b[0], b[1]);
      }
    }
  };

  static MIXRANK_DEVICE int offset(int token, int col) {
    return kNarrow ? col / kBoxCols * kBoxBytes + box_offset(token, col % kBoxCols) : token * kRowBytes + col * 4;
  }

  // The row of a step that a thread's term `slot` is, of 0 to 3.
  static MIXRANK_DEVICE int token_of(int slot, int lane) {
    return kNarrow ? lane % 4 * 2 + slot % 2 + slot / 2 * 8 : lane % 4 + slot * 4;
  }

  static MIXRANK_DEVICE void copy_tile(char* to, const void* from, int64_t stride, int64_t first_row, int64_t last_row,
                                       int first_col, int cols, int access) {
    constexpr int kSize = sizeof(Element), kUnits = kGramTile * kSize / 16;
    for (int i = static_cast<int>(threadIdx.x); i < kDepth * kUnits; i += kThreads) {
      const int token = i / kUnits, col = i % kUnits * (16 / kSize);
      const bool inside = first_row + token < last_row && first_col + col < cols;
      const int64_t at = inside ? (first_row + token) * stride + first_col + col : 0;
      const int left = cols - first_col - col;
      copy_unit(to + offset(token, col), static_cast<const char*>(from) + at * kSize,
                inside ? (left < 16 ? left * kSize : 16) : 0, access);
    }
  }

  struct Operands {
    const Element* x;
    const Element* z;
  };

  static MIXRANK_DEVICE void copy_chunk(const Params& params, const GramTile& where, const Operands& from, int index,
                                        char* stage) {
    const int64_t first = where.first_row + static_cast<int64_t>(index) * kDepth;
    copy_tile(stage, from.x, params.x_stride, first, where.last_row, where.at.row * kGramTile, params.K, params.x_access);
    if (where.diagonal) return;
    copy_tile(stage + kTileBytes, from.z, params.z_stride, first, where.last_row, where.at.col * kGramTile, params.N,
              params.z_access);
  }

  static MIXRANK_DEVICE float value(const char* tile, int token, int col) {
    Element element;
    memcpy(&element, tile + offset(token, col), sizeof(element));
    return Source::widen(element);
  }

  // Pairs of 16-bit values as read: weighted and split.
  template <int Terms, int Parts>
  static MIXRANK_DEVICE void split_pair(uint32_t pair, float low_weight, float high_weight, uint32_t (&parts)[Parts]) {
    split<Terms>(Source::widen(static_cast<uint16_t>(pair & 0xFFFFu)) * low_weight,
          Source::widen(static_cast<uint16_t>(pair >> 16)) * high_weight, parts);
  }

  static MIXRANK_DEVICE void load_left(uint32_t (&a)[kPartsLeft][4], const char* tile, int col, int step, int lane,
                                       const float (&weight)[4]) {
    if constexpr (kNarrow) {
      uint32_t r[4];
      load_matrices_transposed(r, tile + offset(step * 16 + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kPartsLeft == 1) {
          a[0][i] = r[i];
        } else {
          uint32_t parts[kPartsLeft];
          split_pair<TermsLeft>(r[i], weight[i / 2 * 2], weight[i / 2 * 2 + 1], parts);
#pragma unroll
          for (int t = 0; t < kPartsLeft; ++t) a[t][i] = parts[t];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float v[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int slot = i / 2 * 2 + j;
          v[j] = value(tile, step * 16 + token_of(slot, lane), col + i % 2 * 8 + lane / 4);
          if constexpr (Weighted) v[j] *= weight[slot];
        }
        uint32_t parts[kPartsLeft];
        split<TermsLeft>(v[0], v[1], parts);
#pragma unroll
        for (int t = 0; t < kPartsLeft; ++t) a[t][i] = parts[t];
      }
    }
  }

  static MIXRANK_DEVICE void load_right(uint32_t (&b)[2][kPartsRight][2], const char* tile, int col, int step, int lane) {
    uint32_t r[4];
    if constexpr (kNarrow) {
      load_matrices_transposed(r, tile + offset(step * 16 + lane % 16, col + lane / 16 * 8));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t parts[kPartsRight];
      if constexpr (kNarrow && kPartsRight == 1) {
        parts[0] = r[i];
      } else if constexpr (kNarrow) {
        split_pair<TermsRight>(r[i], 1.0f, 1.0f, parts);
      } else {
        const int at = col + i / 2 * 8 + lane / 4;
        split<TermsRight>(value(tile, step * 16 + token_of(i % 2 * 2, lane), at),
                          value(tile, step * 16 + token_of(i % 2 * 2 + 1, lane), at), parts);
      }
#pragma unroll
      for (int t = 0; t < kPartsRight; ++t) b[i / 2][t][i % 2] = parts[t];
    }
  }

  static MIXRANK_DEVICE float weight_at(const float* weight, int64_t row, int64_t last_row) {
    return Weighted && row < last_row ? weight[row] : 0.0f;
  }

  static MIXRANK_DEVICE void run(const Params& params) {
    next_launch_start();
    char* memory = shared_memory();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int row = warp / kWarpCols * (kRowTiles * 16), col = warp % kWarpCols * (kColTiles * 8);
    const GramTile where = GramTile::of(params, blockIdx.x, kGramTile);
    const Operands from = {static_cast<const Element*>(params.x) + where.batch * params.x_batch_stride,
                           static_cast<const Element*>(params.z) + where.batch * params.z_batch_stride};
    const float* weight = params.weight + where.batch * params.M;
    const int chunks = static_cast<int>(ceil_div(where.last_row - where.first_row, kDepth));
    const bool summing = params.partial_sum != nullptr && where.diagonal && thread < kGramTile;

    float sum[kRowTiles][kColTiles][4] = {};
    float column_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < chunks) copy_chunk(params, where, from, i, memory + i * 2 * kTileBytes);
      copy_commit();
    }
    for (int i = 0; i < chunks; ++i) {
      copy_wait<kStages - 2>();
      __syncthreads();  // the chunk is there for all, and all have read the one whose place the next takes
      const int next = i + kStages - 1;
      if (next < chunks) copy_chunk(params, where, from, next, memory + next % kStages * 2 * kTileBytes);
      copy_commit();

      const char* left = memory + i % kStages * 2 * kTileBytes;
      const char* right = where.diagonal ? left : left + kTileBytes;
      const int64_t first_row = where.first_row + static_cast<int64_t>(i) * kDepth;
      if (summing) {
        for (int token = 0; token < kDepth; ++token) {
          const float v = value(left, token, thread);
          column_sum += Weighted ? v * weight_at(weight, first_row + token, where.last_row) : v;
        }
      }
#pragma unroll kStepsAtOnce
      for (int step = 0; step < kDepth / 16; ++step) {
        float weights[4] = {};
        if constexpr (Weighted) {
#pragma unroll
          for (int slot = 0; slot < 4; ++slot) {
            weights[slot] = weight_at(weight, first_row + step * 16 + token_of(slot, lane), where.last_row);
          }
        }
        uint32_t a[kRowTiles][kPartsLeft][4];
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) load_left(a[t], left, row + t * 16, step, lane, weights);
#pragma unroll
        for (int j = 0; j < kColTiles; j += 2) {
          uint32_t b[2][kPartsRight][2];
          load_right(b, right, col + j * 8, step, lane);
#pragma unroll
          for (int t = 0; t < kRowTiles; ++t) {
            multiply_terms<Terms, TermsLeft, TermsRight>(sum[t][j], a[t], b[0]);
            multiply_terms<Terms, TermsLeft, TermsRight>(sum[t][j + 1], a[t], b[1]);
          }
        }
      }
    }
    copy_wait<0>();

    float* partial = where.partial(params);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) store_partial(partial, sum[i][j], row + i * 16, col + j * 8, lane);
    }
    if (summing) where.partial_sum(params)[thread] = column_sum;
  }
};

}  // namespace mixrank
