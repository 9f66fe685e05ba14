// What the Gram kernels of all architectures share: which tile of which split of which matrix a block computes, and where its
// sum goes.
#pragma once

#include "cuda/device.h"
#include "cuda/params.h"
#include "cuda/schedule.h"

namespace mixrank {

constexpr int kGramTile = 128;
constexpr int kGramQuad = 2 * kGramTile;

// Squares of `size` of one matrix, of which those of the lower triangle where z is x.
MIXRANK_HOST_DEVICE int64_t gram_squares(int K, int N, bool cross, int size) {
  const int64_t rows = ceil_div(K, size);
  return cross ? rows * ceil_div(N, size) : triangle_tiles(rows);
}

struct GramTile {
  int split;  // of this launch
  int batch;
  Tile at;
  int64_t first_row, last_row;
  bool diagonal;

  // The square of `size` that block `block` of the launch computes. Neighbouring blocks take the same rows, which L2 then holds
  // once.
  MIXRANK_HOST_DEVICE static GramTile of(const GramParams& params, int64_t block, int size) {
    const int64_t count = gram_squares(params.K, params.N, params.cross, size);
    GramTile found;
    found.batch = static_cast<int>(block / count % params.batches);
    found.split = static_cast<int>(block / count / params.batches);
    found.at = params.cross ? rectangle_tile(block % count, static_cast<int>(ceil_div(params.N, size)))
                            : triangle_tile(block % count);
    found.first_row = (params.first_split + found.split) * params.split_rows;
    found.last_row = found.first_row + params.split_rows < params.M ? found.first_row + params.split_rows : params.M;
    found.diagonal = !params.cross && found.at.row == found.at.col;
    return found;
  }

  // One of the four tiles of a quad.
  MIXRANK_HOST_DEVICE GramTile quarter(const GramParams& params, int row, int col) const {
    GramTile found = *this;
    found.at = {at.row * 2 + row, at.col * 2 + col};
    found.diagonal = !params.cross && found.at.row == found.at.col;
    return found;
  }

  // Whether the tile is one that is to be computed: of a quad on the edge or on the diagonal some are not.
  MIXRANK_HOST_DEVICE bool wanted(const GramParams& params) const {
    return static_cast<int64_t>(at.row) * kGramTile < params.K && static_cast<int64_t>(at.col) * kGramTile < params.N &&
           (params.cross || at.col <= at.row);
  }

  MIXRANK_HOST_DEVICE float* partial(const GramParams& params) const {
    const int64_t row = at.row, count = gram_squares(params.K, params.N, params.cross, kGramTile);
    const int64_t tile = (params.cross ? row * ceil_div(params.N, kGramTile) : triangle_tiles(row)) + at.col;
    return params.partial + ((static_cast<int64_t>(split) * params.batches + batch) * count + tile) * kGramTile * kGramTile;
  }

  MIXRANK_HOST_DEVICE float* partial_sum(const GramParams& params) const {
    const int64_t rows = ceil_div(params.K, kGramTile);
    return params.partial_sum + ((static_cast<int64_t>(split) * params.batches + batch) * rows + at.row) * kGramTile;
  }
};

// A 16 x 8 result of a tile, at its row and column.
MIXRANK_DEVICE void store_partial(float* partial, const float* sum, int row, int col, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    *reinterpret_cast<float2*>(partial + (row + half * 8 + lane / 4) * kGramTile + col + lane % 4 * 2) =
        make_float2(sum[half * 2], sum[half * 2 + 1]);
  }
}

}  // namespace mixrank
