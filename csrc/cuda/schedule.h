// Which block computes which tile of which sum: integer functions that run on the host and on the device alike.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/host_device.h"

namespace mixrank {

struct Tile {
  int row, col;  // in tiles
};

MIXRANK_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MIXRANK_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Tiles of a rectangle, row by row: neighbours share the rows of the left operand, which is the larger one.
MIXRANK_HOST_DEVICE Tile rectangle_tile(int64_t index, int cols) {
  return {static_cast<int>(index / cols), static_cast<int>(index % cols)};
}

// Tiles of the lower triangle with its diagonal, row by row: row r begins at r (r + 1) / 2. No block is launched for the upper
// triangle. The root is rounded, and corrected by comparing integers.
MIXRANK_HOST_DEVICE Tile triangle_tile(int64_t index) {
  int64_t row = static_cast<int64_t>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  while (row * (row + 1) / 2 > index) --row;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return {static_cast<int>(row), static_cast<int>(index - row * (row + 1) / 2)};
}

MIXRANK_HOST_DEVICE constexpr int64_t triangle_tiles(int64_t rows) { return rows * (rows + 1) / 2; }

// The rows (tokens) of a Gram matrix in rounds of splits. Each split of each tile is one fp32 sum and one block; the sums of a round
// lie in scratch memory until they are added, in order.
struct RowSchedule {
  int64_t split_rows;    // of each split but the last, a multiple of kSplitStep
  int64_t splits;        // in all; split s has the rows from s * split_rows on, and is never empty
  int64_t round_splits;  // in each round but the last
};

constexpr int64_t kSplitStep = 64;
constexpr int64_t kSplitRowsMin = 256;   // a tile's sum must be worth writing and reading 64 KiB
constexpr int64_t kSplitRowsMax = 4096;  // in one fp32 sum
constexpr int64_t kScratchBytes = int64_t{256} << 20;
// Multiprocessors: a constant and not a property of a device, so that every card with the same kernels gives the same bits.
constexpr int64_t kMultiprocessors = 132;

// For `rows` >= 1 rows, `blocks` blocks to a split, of which `slots` run at one time, and at most `most` splits at one time. Takes the
// split that leaves the least of the last wave idle.
MIXRANK_HOST_DEVICE RowSchedule row_schedule(int64_t rows, int64_t blocks, int64_t slots, int64_t most) {
  const int64_t fewest = ceil_div(rows, kSplitRowsMax), finest = ceil_div(rows, kSplitRowsMin);
  int64_t best = fewest, best_time = 0;
  for (int64_t splits = fewest; splits <= finest && splits <= fewest + 64; ++splits) {
    const int64_t length = round_up(ceil_div(rows, splits), kSplitStep);
    // A wave takes the time of its split's rows, and of the sum that it writes: as much as that of kSplitStep rows.
    const int64_t time = ceil_div(blocks * ceil_div(rows, length), slots) * (length + kSplitStep);
    if (splits == fewest || time < best_time) {
      best = splits;
      best_time = time;
    }
  }
  RowSchedule schedule;
  schedule.split_rows = round_up(ceil_div(rows, best), kSplitStep);
  schedule.splits = ceil_div(rows, schedule.split_rows);
  schedule.round_splits = schedule.splits < most ? schedule.splits : (most > 1 ? most : 1);
  return schedule;
}

}  // namespace mixrank
