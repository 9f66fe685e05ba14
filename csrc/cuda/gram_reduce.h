// gram += the sums of all splits, in their order: see ReduceParams. The same bits at every run.
//
// A block takes kStrip rows of a tile: read along the rows, added to gram, turned in shared memory, and added once more on the other
// side of the diagonal. Sums are in the dtype of gram.
#pragma once

#include "cuda/gram_tiles.h"

namespace mixrank {

template <class Master>
struct GramReduce {
  using Params = ReduceParams;

  static constexpr int kStrip = 32;
  static constexpr int kStrips = kGramTile / kStrip;
  static constexpr int kArchitecture = 80;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kPitch = kGramTile + 1;
  static constexpr int kSharedBytes = kStrip * kPitch * static_cast<int>(sizeof(Master));

  static MIXRANK_DEVICE Master summed(const float* partial, int64_t splits, int64_t stride) {
    Master sum = 0;
    for (int64_t i = 0; i < splits; ++i) sum += static_cast<Master>(partial[i * stride]);
    return sum;
  }

  static MIXRANK_DEVICE void run(const Params& params) {
    previous_launch_wait();
    auto* strip = reinterpret_cast<Master*>(shared_memory());
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t tiles = gram_squares(params.K, params.N, params.cross, kGramTile);
    const int first = static_cast<int>(blockIdx.x % kStrips) * kStrip;
    const int64_t tile = blockIdx.x / kStrips % tiles, batch = blockIdx.x / kStrips / tiles;
    const Tile at = params.cross ? rectangle_tile(tile, static_cast<int>(ceil_div(params.N, kGramTile)))
                                 : triangle_tile(tile);
    const int64_t row = static_cast<int64_t>(at.row) * kGramTile + first, col = static_cast<int64_t>(at.col) * kGramTile;
    const float* partial = params.partial + ((batch * tiles + tile) * kGramTile + first) * kGramTile;
    const int64_t split_stride = params.batches * tiles * kGramTile * kGramTile;
    Master* gram = static_cast<Master*>(params.gram) + batch * params.K * params.N;

    for (int i = thread; i < kStrip * kGramTile; i += kThreads) {
      const int r = i / kGramTile, c = i % kGramTile;
      const Master sum = summed(partial + i, params.splits, split_stride);
      strip[r * kPitch + c] = sum;
      if (row + r < params.K && (params.cross ? col + c < params.N : col + c <= row + r)) {
        gram[(row + r) * params.N + col + c] += sum;
      }
    }
    if (params.cross) return;
    __syncthreads();
    for (int i = thread; i < kStrip * kGramTile; i += kThreads) {
      const int r = i % kStrip, c = i / kStrip;
      if (row + r < params.K && col + c < row + r) gram[(col + c) * params.N + row + r] += strip[r * kPitch + c];
    }
    if (params.column_sum != nullptr && at.row == at.col && thread < kStrip && row + thread < params.K) {
      const int64_t rows = ceil_div(params.K, kGramTile);
      const float* sums = params.partial_sum + (batch * rows + at.row) * kGramTile + first + thread;
      static_cast<Master*>(params.column_sum)[batch * params.K + row + thread] +=
          summed(sums, params.splits, params.batches * rows * kGramTile);
    }
  }
};

}  // namespace mixrank
