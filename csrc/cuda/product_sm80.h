// c = a b^T + ... by mma.sync and cp.async, for every architecture from sm_80 on: see ProductParams.
//
// A block computes a tile of kRows x kCols with all its terms in one sum: the terms' depths follow each other as chunks of
// kDepth elements (128 bytes), each of which two tiles of shared memory hold; kStages chunks are there or on their way.
// Any shape, any row stride, any alignment of elements.
//
// Where the launch before this one may be overlapped (Hopper), the b of the first chunks is fetched while that one still runs.
#pragma once

#include "cuda/operands.h"
#include "cuda/product_tiles.h"
#include "cuda/sparse.h"
#include "cuda/store.h"

namespace mixrank {

// Tiles of Rows x Cols, divided among WarpRows x WarpCols warps.
template <class OperandType, int Rows, int Cols, int WarpRows, int WarpCols, int Stages>
struct ProductSm80 {
  using Params = ProductParams;
  using Operand = OperandType;
  using Element = typename Operand::Element;

  static constexpr int kRows = Rows, kCols = Cols, kStages = Stages;
  static constexpr int kDepth = Operand::kDepth;
  static constexpr int kArchitecture = 80;
  static constexpr int kThreads = WarpRows * WarpCols * 32;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kStageBytes = (Rows + Cols) * kBoxRowBytes;
  static constexpr int kSharedBytes = Stages * kStageBytes;
  static constexpr int kRowTiles = Rows / WarpRows / 16, kColTiles = Cols / WarpCols / 8;
  static_assert(Rows % (WarpRows * 16) == 0 && Cols % (WarpCols * 16) == 0);
  static_assert((Rows + Cols) * 8 % kThreads == 0);

  static MIXRANK_DEVICE void copy_tile(char* to, const void* from, int64_t stride, int64_t first_row, int64_t rows,
                                       int first, int depth, int access, int count) {
    constexpr int kSize = sizeof(Element);
    for (int i = static_cast<int>(threadIdx.x); i < count * 8; i += kThreads) {
      const int row = i / 8, unit = i % 8, at = first + unit * (16 / kSize);
      const bool inside = first_row + row < rows && at < depth;
      const int64_t offset = inside ? (first_row + row) * stride + at : 0;
      copy_unit(to + box_offset(row, unit * 8), static_cast<const char*>(from) + offset * kSize,
                inside ? (depth - at < 16 ? (depth - at) * kSize : 16) : 0, access);
    }
  }

  static MIXRANK_DEVICE void copy_left(const Params& params, const OutputTile& where, int index, char* stages) {
    const Chunk chunk = chunk_at(params, where.output, index, kDepth);
    const Term& term = params.terms[chunk.term];
    copy_tile(stages + index % Stages * kStageBytes, term.a, term.a_stride, static_cast<int64_t>(where.tile.row) * Rows,
              params.M, chunk.depth, term.depth, term.a_access, Rows);
  }

  static MIXRANK_DEVICE void copy_right(const Params& params, const OutputTile& where, int index, char* stages) {
    const Chunk chunk = chunk_at(params, where.output, index, kDepth);
    const Term& term = params.terms[chunk.term];
    copy_tile(stages + index % Stages * kStageBytes + Rows * kBoxRowBytes, term.b, term.b_stride,
              static_cast<int64_t>(where.tile.col) * Cols, params.outputs[where.output].N, chunk.depth, term.depth,
              term.b_access, Cols);
  }

  static MIXRANK_DEVICE void multiply_chunk(float (&sum)[kRowTiles][kColTiles][4], const char* stage, int row, int col,
                                            int lane) {
    constexpr int kParts = Operand::kParts;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      uint32_t a[kRowTiles][kParts][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) load_left<Operand>(a[i], stage, row + i * 16, step, lane);
#pragma unroll
      for (int j = 0; j < kColTiles; j += 2) {
        uint32_t b[2][kParts][2];
        load_right<Operand>(b, stage + Rows * kBoxRowBytes, col + j * 8, step, lane);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_terms<Operand, Operand::kTerms, Operand::kTerms>(sum[i][j], a[i], b[0]);
          multiply_terms<Operand, Operand::kTerms, Operand::kTerms>(sum[i][j + 1], a[i], b[1]);
        }
      }
    }
  }

  static MIXRANK_DEVICE void run(const Params& params) {
    next_launch_start();
    char* memory = shared_memory();
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int row = warp / WarpCols * (kRowTiles * 16), col = warp % WarpCols * (kColTiles * 8);
    const OutputTile where = output_tile(params, blockIdx.x, Cols);
    const int chunks = chunk_count(params, where.output, kDepth);

    float sum[kRowTiles][kColTiles][4] = {};
    // What the launch before this one does not write is asked for before that one is waited for.
    const int ahead = chunks < Stages - 1 ? chunks : Stages - 1;
    for (int i = 0; i < ahead; ++i) copy_right(params, where, i, memory);
    if (params.follows) previous_launch_wait();
#pragma unroll
    for (int i = 0; i < Stages - 1; ++i) {
      if (i < chunks) copy_left(params, where, i, memory);
      copy_commit();
    }
    for (int i = 0; i < chunks; ++i) {
      copy_wait<Stages - 2>();
      __syncthreads();  // the chunk is there for all, and all have read the one whose place the next takes
      const int next = i + Stages - 1;
      if (next < chunks) {
        copy_left(params, where, next, memory);
        copy_right(params, where, next, memory);
      }
      copy_commit();
      multiply_chunk(sum, memory + i % Stages * kStageBytes, row, col, lane);
    }
    copy_wait<0>();

    const int64_t first_row = static_cast<int64_t>(where.tile.row) * Rows + row;
    const int first_col = where.tile.col * Cols + col;
    if (params.sparse.size != 0) {
      add_sparse<Operand>(sum, params.sparse, first_row, first_col, params.M, params.outputs[0].N, lane);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      store_rows<Operand>(sum[i], params.outputs[where.output], params.bias, first_row + i * 16, first_col, params.M, lane);
    }
  }
};

}  // namespace mixrank
