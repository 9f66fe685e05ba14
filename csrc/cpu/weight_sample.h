// A hash of a few elements of every weight. Writes that torch does not count (through weight.data) leave packed weights
// behind; one to a whole tensor shows here.
#pragma once

#include <cstdint>
#include <cstring>

namespace mixrank {

class WeightSample {
 public:
  // Of a matrix of elements of `size` bytes, at most eight, with strides in elements.
  void add(const void* data, int64_t size, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    constexpr int64_t kSamples = 16;
    for (int64_t i = 0; i < kSamples && rows > 0; ++i) {
      const int64_t row = i * (rows - 1) / (kSamples - 1), col = (kSamples - 1 - i) * (cols - 1) / (kSamples - 1);
      uint64_t bits = 0;
      memcpy(&bits, static_cast<const char*>(data) + (row * row_stride + col * col_stride) * size, size);
      hash_ = (hash_ ^ bits) * 1099511628211u;
    }
  }

  uint64_t hash() const { return hash_; }

 private:
  uint64_t hash_ = 14695981039346656037u;
};

}  // namespace mixrank
