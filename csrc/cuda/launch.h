// What the launches of all operators share. A Launcher is CUDA's (launcher.cuh) or the emulator's:
//
//   int architecture();                             80 or 90, for the kernels of that architecture
//   TensorMap map(base, cols, rows, batches, row_stride, batch_stride, box_rows);   strides in elements of 16 bits
//   void launch<Kernel>(int64_t blocks, const Params&, bool overlaps);   overlaps: may begin before the last launch has ended;
//                                                   in clusters of Kernel::kCluster blocks where there is such a number
#pragma once

#include <stdint.h>

namespace mixrank {

// Bytes of rows so far apart that may be read at once: 16, 4 or an element.
inline int access_of(const void* base, int64_t row_bytes, int element_bytes) {
  const uint64_t bits = reinterpret_cast<uint64_t>(base) | static_cast<uint64_t>(row_bytes);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : element_bytes;
}

}  // namespace mixrank
