// How the tiles that the copy engine brings lie in shared memory, and what the tensor cores are told about it.
//
// A box is rows of 64 elements of 16 bits: 128 bytes, in eight units of 16 bytes. Unit u of row r lies at unit u ^ (r % 8)
// (the 128-byte swizzle), so that eight rows of one unit, and eight units of one row, take all banks once. Boxes begin at
// multiples of 1024 bytes.
#pragma once

#include <stdint.h>

#include "cuda/host_device.h"

namespace mixrank {

constexpr int kBoxCols = 64;
constexpr int kBoxRowBytes = 128;

// Where element (row, col) of a box lies, in bytes from its beginning.
MIXRANK_HOST_DEVICE constexpr int box_offset(int row, int col) {
  return row * kBoxRowBytes + (((col / 8) ^ (row % 8)) * 16) + col % 8 * 2;
}

// A wgmma descriptor: bits 0-13 address, 16-29 leading offset, 32-45 stride offset, all in units of 16 bytes; 62-63 swizzle, 1
// for 128 bytes.
MIXRANK_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return (static_cast<uint64_t>(address & 0x3FFFF) >> 4) | (static_cast<uint64_t>((leading & 0x3FFFF) >> 4) << 16) |
         (static_cast<uint64_t>((stride & 0x3FFFF) >> 4) << 32) | (static_cast<uint64_t>(1) << 62);
}

// Rows of terms: the operand's rows are the box's rows, its 16 terms begin at column 16 * step. Groups of eight rows
// follow each other.
MIXRANK_HOST_DEVICE constexpr uint64_t rows_descriptor(uint32_t box, int first_row, int step) {
  return descriptor(box + first_row * kBoxRowBytes + step * 32, 16, 8 * kBoxRowBytes);
}

// Terms across rows: the operand's rows are columns of the box, and of the boxes that follow `box_bytes` apart; its 16 terms
// are the box's rows from 16 * step on.
MIXRANK_HOST_DEVICE constexpr uint64_t across_descriptor(uint32_t box, int step, int box_bytes) {
  return descriptor(box + step * 16 * kBoxRowBytes, box_bytes, 8 * kBoxRowBytes);
}

}  // namespace mixrank
