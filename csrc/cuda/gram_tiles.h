// What the Gram kernels of all architectures share: which tile of which split of which matrix a block computes, and where its
// sum goes.
#pragma once

#include "cuda/device.h"
#include "cuda/params.h"
#include "cuda/schedule.h"

namespace mixrank {

constexpr int kGramTile = 128;

struct GramTile {
  int split;   // of this launch
  int batch;
  int tile;    // of the matrix
  Tile at;
  int64_t first_row, last_row;
  bool diagonal;

  MIXRANK_HOST_DEVICE static int64_t tiles(int K, int N, bool cross) {
    const int64_t rows = ceil_div(K, kGramTile);
    return cross ? rows * ceil_div(N, kGramTile) : triangle_tiles(rows);
  }

  // Neighbouring blocks take the same rows, which L2 then holds once.
  MIXRANK_HOST_DEVICE static GramTile of(const GramParams& params, int64_t block) {
    const int64_t count = tiles(params.K, params.N, params.cross);
    GramTile found;
    found.tile = static_cast<int>(block % count);
    found.batch = static_cast<int>(block / count % params.batches);
    found.split = static_cast<int>(block / count / params.batches);
    found.at = params.cross ? rectangle_tile(found.tile, static_cast<int>(ceil_div(params.N, kGramTile)))
                            : triangle_tile(found.tile);
    found.first_row = (params.first_split + found.split) * params.split_rows;
    found.last_row = found.first_row + params.split_rows < params.M ? found.first_row + params.split_rows : params.M;
    found.diagonal = !params.cross && found.at.row == found.at.col;
    return found;
  }

  MIXRANK_HOST_DEVICE float* partial(const GramParams& params) const {
    const int64_t count = tiles(params.K, params.N, params.cross);
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
    float2 pair;
    pair.x = sum[half * 2];
    pair.y = sum[half * 2 + 1];
    *reinterpret_cast<float2*>(partial + (row + half * 8 + lane / 4) * kGramTile + col + lane % 4 * 2) = pair;
  }
}

}  // namespace mixrank
