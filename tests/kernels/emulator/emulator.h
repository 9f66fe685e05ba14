// Launches kernels on the emulated instructions of ptx.h.
//
// A kernel is a struct with Params, kThreads, kSharedBytes, run(const Params&) and, where blocks form clusters, their
// number kCluster. The threads of a block are fibers, which switch only where an instruction waits; the blocks of a
// cluster run at the same time, clusters one after the other. The seed chooses the order of the clusters and which
// thread goes on: mostly one warp of one block runs as far ahead as it can, so that a missing barrier shows.
//
// Asynchronous instructions take effect at once or, with `late`, as late as they may. copy_async: when its thread waits
// for the group. Boxes and copies to blocks, which are read only then, each block's by itself: when every thread waits
// or, with two of three seeds, at a random switch, in any order. wgmma: reads its operands when the first warp waits
// for the group, and leaves NaN in each thread's sums until its own warp has waited. store_box: reads at store_wait,
// writes when the block ends. A launch that the next one overlaps: when every thread of that one waits. A correct
// kernel gives the same result either way and with every seed.
//
// Shared memory is NaN when a block begins. The tensor cores and the copy engine see what plain stores and copy_async
// wrote to it after an async_fence or, with every other seed, at once. Six seeds in a row have everything that depends
// on the seed in all combinations.
//
// Not detected:
// - an async_fence by another thread than the one that wrote, if it comes after the write;
// - accesses outside global tensors, and outside shared memory by more than kMargin bytes (machine.h) or only reading;
// - two threads that use the same memory without a barrier, where every order that was tried gives the same result;
// - sums used between wgmma and group_wait, other than by the NaN in them, and not at all unless `late`;
// - a block that ends before its copy to another one has been read, where it was read in time: so change the seed;
// - too early reads of what the previous launch writes in blocks after the first that waits for it: so change the seed.
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
  int cluster;                             // blocks, next to each other in x
  std::function<void()> thread;            // what each thread does
  std::shared_ptr<const Launch> previous;  // has not run yet: runs when this launch waits for it
};

void run(const Launch& launch, const Options& options);

template <class Kernel>
Launch make_launch(int64_t x, int64_t y, int64_t z, const typename Kernel::Params& params) {
  const dim3 grid{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
  // Shared, because tensor maps have to be aligned and to stay where they are.
  const auto held = std::make_shared<const typename Kernel::Params>(params);
  int cluster = 1;
  if constexpr (requires { Kernel::kCluster; }) cluster = Kernel::kCluster;
  return {grid, Kernel::kThreads, Kernel::kSharedBytes, cluster, [held] { Kernel::run(*held); }, nullptr};
}

template <class Kernel>
void launch(int64_t x, int64_t y, int64_t z, const typename Kernel::Params& params, Options options = {}) {
  run(make_launch<Kernel>(x, y, z, params), options);
}

// Launches in order. One that overlaps the previous one may begin before that has run, and has to call
// previous_launch_wait.
class Queue {
 public:
  explicit Queue(Options options) : options_(options) {}

  template <class Kernel>
  void launch(int64_t x, int64_t y, int64_t z, const typename Kernel::Params& params, bool overlaps_previous) {
    push(make_launch<Kernel>(x, y, z, params), overlaps_previous);
  }

  // Runs what has not run yet; nothing else does.
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
