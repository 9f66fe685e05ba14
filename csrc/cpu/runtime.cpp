#include "cpu/runtime.h"

#include <torch/csrc/stable/ops.h>

#include <new>

namespace mixrank {
namespace {

constexpr size_t kAlignment = 64;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  void release() {
    ::operator delete(data, std::align_val_t(kAlignment));
    data = nullptr;
    bytes = 0;
  }
};

}  // namespace

void parallel_for(int64_t count, int64_t grain, RangeFn fn, void* context) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { fn(begin, end, context); });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

void* scratch(Scratch slot, size_t bytes) {
  static thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
#if defined(__SANITIZE_ADDRESS__)
  const bool fits = buffer.bytes == bytes;  // so that the sanitizer sees where the memory ends
#else
  const bool fits = buffer.bytes >= bytes;
#endif
  if (!fits) {
    buffer.release();
    buffer.data = ::operator new(bytes, std::align_val_t(kAlignment));
    buffer.bytes = bytes;
  }
  return buffer.data;
}

}  // namespace mixrank
