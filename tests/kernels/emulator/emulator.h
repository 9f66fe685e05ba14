// Launches kernels on the emulated instructions of ptx.h.
//
// A kernel is a struct with Params, kThreads, kSharedBytes and run(const Params&). The threads of a block are fibers, which
// switch only where an instruction waits; blocks run one after the other. The seed chooses the order of the blocks and
// which thread goes on: mostly one warp runs as far ahead as it can, so that a missing barrier shows.
//
// Asynchronous instructions take effect at once or, with `late`, as late as they may: copy_async when its thread waits for
// the group; a box when every thread waits or, with two of three seeds, at a random switch, in any order; wgmma reads its operands when the first
// warp waits for the group, and leaves NaN in each thread's sums until its own warp has waited; store_box reads at
// store_wait and writes when the block ends; a launch that the next one overlaps runs when every thread of that one waits.
// A correct kernel gives the same result either way and with every seed.
//
// Shared memory is NaN when a block begins. The tensor cores and the copy engine see what plain stores and copy_async wrote
// to it only after an async_fence. Not detected: an async_fence by another thread than the one that wrote, if it comes
// later than the write; accesses outside tensors, and outside shared memory by more than kMargin bytes (machine.h); plain
// reads of what another thread writes, unless the order of the threads shows it; reading of sums between wgmma and
// group_wait with other effect than NaN, or if not `late`; in the blocks after the one that waits first for the previous
// launch, reads that should have waited too.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <string>

#include "emulator/ptx.h"

namespace mixrank {

// Refuses what cuTensorMapEncodeTiled refuses.
TensorMap make_map(const void* base, int64_t cols, int64_t rows, int64_t batches, int64_t row_bytes,
                   int64_t batch_bytes, int box_rows);

namespace emulator {

struct Options {
  bool late = false;
  uint64_t seed = 0;
};

struct Launch {
  dim3 grid;
  int threads;
  int shared_bytes;
  std::function<void()> thread;            // what each thread does
  std::shared_ptr<const Launch> previous;  // has not run yet: runs when this launch waits for it
};

void run(const Launch& launch, const Options& options);

template <class Kernel>
Launch make_launch(int64_t x, int64_t y, int64_t z, const typename Kernel::Params& params) {
  const dim3 grid{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
  // Shared, because tensor maps have to be aligned and to stay where they are.
  const auto held = std::make_shared<const typename Kernel::Params>(params);
  return {grid, Kernel::kThreads, Kernel::kSharedBytes, [held] { Kernel::run(*held); }, nullptr};
}

template <class Kernel>
void launch(int64_t x, int64_t y, int64_t z, const typename Kernel::Params& params, Options options = {}) {
  run(make_launch<Kernel>(x, y, z, params), options);
}

// Launches in order. One that overlaps the previous one may begin before it has run and has to call previous_launch_wait.
class Queue {
 public:
  explicit Queue(Options options) : options_(options) {}

  template <class Kernel>
  void launch(int64_t x, int64_t y, int64_t z, const typename Kernel::Params& params, bool overlaps_previous) {
    push(make_launch<Kernel>(x, y, z, params), overlaps_previous);
  }

  // Runs what has not run yet.
  void finish();

 private:
  void push(Launch launch, bool overlaps_previous);

  Options options_;
  std::shared_ptr<const Launch> last_;
};

// What `call` threw, as C functions return it: null when it threw nothing, valid until the next call.
template <class Call>
const char* message_of(Call&& call) {
  static std::string message;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace emulator
}  // namespace mixrank
