// What the kernels of a product share: which tile of which output a block computes, and in which order the terms are summed.
#pragma once

#include "cuda/params.h"
#include "cuda/schedule.h"

namespace mixrank {

// The chunk at `index` of the terms of one output: which term, and where in its depth.
struct Chunk {
  int term;
  int depth;
};

MIXRANK_HOST_DEVICE Chunk chunk_at(const ProductParams& params, int output, int index, int depth_step) {
  const int first = static_cast<int>(ceil_div(params.terms[0].depth, depth_step));
  const bool second = params.output_count == 1 && index >= first;
  return {output + (second ? 1 : 0), (second ? index - first : index) * depth_step};
}

MIXRANK_HOST_DEVICE int chunk_count(const ProductParams& params, int output, int depth_step) {
  int count = 0;
  for (int i = 0; i < params.term_count; ++i) {
    count += static_cast<int>(ceil_div(params.terms[output + i].depth, depth_step));
  }
  return count;
}

// The tiles of both outputs side by side, and where the one of `index` is: which output, and its row and column of tiles.
struct OutputTile {
  int output;
  Tile tile;
};

MIXRANK_HOST_DEVICE int tile_columns(const ProductParams& params, int cols) {
  const int first = static_cast<int>(ceil_div(params.outputs[0].N, cols));
  return params.output_count == 2 ? first + static_cast<int>(ceil_div(params.outputs[1].N, cols)) : first;
}

MIXRANK_HOST_DEVICE OutputTile output_tile(const ProductParams& params, int64_t index, int cols) {
  Tile tile = rectangle_tile(index, tile_columns(params, cols));
  const int first = static_cast<int>(ceil_div(params.outputs[0].N, cols));
  if (tile.col < first) return {0, tile};
  tile.col -= first;
  return {1, tile};
}

}  // namespace mixrank
