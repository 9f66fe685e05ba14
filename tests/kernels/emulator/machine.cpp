// Fibers, the order in which they run, and launches.
#include "emulator/machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <stdexcept>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mixrank::emulator {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 4096;
constexpr char kUntouched = '\xA5';

struct Fiber {
  jmp_buf context;
  bool started = false;
};

// Stacks and shared memory, used again by launch after launch. A launch that runs inside another one has its own.
struct Pool {
  Pool() : fibers(kWarps * kWarp), margins(kMaxShared + 2 * kMargin + 1024) {
    const size_t size = fibers.size() * (kStack + kGuard);
    stacks = static_cast<char*>(
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0));
    if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the threads");
    for (size_t i = 0; i < fibers.size(); ++i) mprotect(stacks + i * (kStack + kGuard), kGuard, PROT_NONE);
    const auto begin = reinterpret_cast<uintptr_t>(margins.data()) + kMargin;
    shared = reinterpret_cast<char*>((begin + 1023) / 1024 * 1024);
  }

  std::vector<Fiber> fibers;
  std::vector<char> margins;
  char* stacks;
  char* shared;
};

Pool& pool(int depth) {
  static std::deque<Pool> pools;
  while (pools.size() <= static_cast<size_t>(depth)) pools.emplace_back();
  return pools[depth];
}

Machine* running = nullptr;
int running_depth = -1;
// Saved without the signal mask, which swapcontext would save with a system call at each switch.
jmp_buf scheduler;

[[noreturn]] void to_scheduler() { _longjmp(scheduler, 1); }

// A fiber runs one thread after the other, so that a context is made once for all launches.
void fiber_main() {
  for (;;) {
    try {
      running->launch.thread();
      running->end_thread();
    } catch (...) {
      running->error = std::current_exception();
    }
    Fiber& fiber = pool(running_depth).fibers[running->thread().index];
    if (_setjmp(fiber.context) == 0) to_scheduler();
  }
}

[[noreturn]] void enter(Fiber& fiber, char* stack) {
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
  abort();
}

}  // namespace

Machine& machine() {
  if (running == nullptr) throw std::runtime_error("an instruction of a kernel was called outside a launch");
  return *running;
}

Machine::Machine(const Launch& launch, const Options& options, int depth)
    : launch(launch),
      options(options),
      random(options.seed),
      previous_ran(launch.previous == nullptr),
      shared(pool(depth).shared),
      depth_(depth),
      landing_(options.seed % 3 == 0 ? 0 : options.seed % 3 == 1 ? 16 : 256) {
  const auto [x, y, z] = launch.grid;
  if (x < 1 || x > 0x7fffffffu || y < 1 || y > 65535 || z < 1 || z > 65535) {
    fail("the grid was " + std::to_string(x) + " x " + std::to_string(y) + " x " + std::to_string(z) +
         ", but must be 1 to 2^31 - 1 x 1 to 65535 x 1 to 65535");
  }
  if (launch.threads < kWarp || launch.threads > kWarps * kWarp || launch.threads % kWarp != 0) {
    fail("kThreads was " + std::to_string(launch.threads) + ", but must be a multiple of 32 up to 1024");
  }
  if (launch.shared_bytes < 0 || launch.shared_bytes > kMaxShared) {
    fail("kSharedBytes was " + std::to_string(launch.shared_bytes) + ", but must be 0 to " +
         std::to_string(kMaxShared));
  }
}

std::string Machine::where() const {
  std::string text = "block (" + std::to_string(block_.x) + ", " + std::to_string(block_.y) + ", " +
                     std::to_string(block_.z) + ")";
  if (current != nullptr) text += ", thread " + std::to_string(current->index);
  return text;
}

void Machine::fail(const std::string& sentence) const { throw std::runtime_error(where() + ": " + sentence); }

void Machine::wait(const char* instruction, std::string detail) {
  current->waits_in = instruction;
  current->waits_for = std::move(detail);
  Fiber& fiber = pool(depth_).fibers[current->index];
  if (_setjmp(fiber.context) == 0) to_scheduler();
}

void Machine::wake(Thread& thread) {
  thread.waits_in = nullptr;
  warps[thread.index / kWarp].ready |= 1u << (thread.index % kWarp);
}

bool Machine::arrive(const char* instruction, const void* operands) {
  Warp& warp = this->warp();
  if (warp.arrived == 0) {
    warp.instruction = instruction;
  } else if (strcmp(warp.instruction, instruction) != 0) {
    fail("came to " + std::string(instruction) + " while other threads of its warp are in " + warp.instruction);
  }
  warp.operands[lane()] = operands;
  warp.arrived |= 1u << lane();
  if (warp.arrived == kWholeWarp) return true;
  wait(instruction);
  return false;
}

void Machine::release() {
  Warp& warp = this->warp();
  warp.arrived = 0;
  const int first = current->index - lane();
  for (int i = 0; i < kWarp; ++i) {
    if (i != lane()) wake(threads[first + i]);
  }
}

void Machine::begin_block() {
  current = nullptr;
  threads.assign(launch.threads, {});
  warps.assign(launch.threads / kWarp, {});
  groups.clear();
  groups.resize(launch.threads / (4 * kWarp));
  for (int i = 0; i < launch.threads; ++i) {
    threads[i].index = i;
    threads[i].copies.resize(1);
    wake(threads[i]);
  }
  order_.resize(warps.size());
  for (size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<int>(i);
  std::shuffle(order_.begin(), order_.end(), random);
  barriers.clear();
  for (NamedBarrier& barrier : named) barrier = {};
  memset(shared - kMargin, kUntouched, kMargin);
  memset(shared, 0xFF, launch.shared_bytes);
  memset(shared + launch.shared_bytes, kUntouched, kMargin);
  visible.assign(launch.shared_bytes, '\xFF');
}

void Machine::end_thread() {
  if (!current->stores.empty()) fail("the thread ended without store_wait after its store_box");
  if (warp().added < warp().issued) fail("the thread ended without group_wait for all its products");
  current->ended = true;
}

void Machine::end_block() {
  current = nullptr;
  if (!loads.empty()) fail(std::to_string(loads.size()) + " boxes were on their way when the block ended");
  const auto untouched = [](const char* begin) {
    return std::all_of(begin, begin + kMargin, [](char byte) { return byte == kUntouched; });
  };
  if (!untouched(shared - kMargin)) fail("memory before shared memory was written");
  if (!untouched(shared + launch.shared_bytes)) {
    fail("memory behind the " + std::to_string(launch.shared_bytes) + " bytes of shared memory was written");
  }
  for (const auto& [box, rows] : stores) write(box, rows.data());
  stores.clear();
}

Thread* Machine::choose() {
  if (random() % 64 == 0) std::shuffle(order_.begin(), order_.end(), random);
  for (const int index : order_) {
    Warp& warp = warps[index];
    if (warp.ready == 0) continue;
    const int shift = static_cast<int>(random() % kWarp);
    const uint32_t turned = warp.ready >> shift | warp.ready << (-shift & 31);
    const int lane = (__builtin_ctz(turned) + shift) % kWarp;
    warp.ready &= ~(1u << lane);
    return &threads[index * kWarp + lane];
  }
  return nullptr;
}

void Machine::resume(Thread& thread) {
  current = &thread;
  threadIdx = {static_cast<unsigned>(thread.index), 0, 0};
  if (_setjmp(scheduler) == 0) {
    enter(pool(depth_).fibers[thread.index], pool(depth_).stacks + thread.index * (kStack + kGuard) + kGuard);
  }
}

void Machine::set_grid() const {
  blockIdx = block_;
  gridDim = launch.grid;
  blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
}

void Machine::deadlock() const {
  std::map<std::string, int> waiting;
  int ended = 0;
  for (const Thread& thread : threads) {
    if (thread.ended) {
      ++ended;
    } else {
      ++waiting[std::string(thread.waits_in) + thread.waits_for];
    }
  }
  std::string text = "deadlock.";
  for (const auto& [what, count] : waiting) text += " " + std::to_string(count) + " threads wait in " + what + ".";
  if (ended != 0) text += " " + std::to_string(ended) + " threads have ended.";
  fail(text);
}

void Machine::run_block() {
  begin_block();
  set_grid();
  for (int left = launch.threads; left > 0;) {
    Thread* next = choose();
    if (next != nullptr) {
      resume(*next);
      if (error) std::rethrow_exception(error);
      left -= next->ended;
    }
    if (!loads.empty() && (next == nullptr || (landing_ != 0 && random() % landing_ == 0))) {
      std::swap(loads[random() % loads.size()], loads.back());
      const Box box = loads.back();
      loads.pop_back();
      land(box);
    } else if (next == nullptr && !waiting_for_launch.empty()) {
      run_previous();
    } else if (next == nullptr) {
      current = nullptr;
      deadlock();
    }
  }
  end_block();
}

void Machine::run_previous() {
  previous_ran = true;
  emulator::run(*launch.previous, options);
  set_grid();
  for (Thread* thread : waiting_for_launch) wake(*thread);
  waiting_for_launch.clear();
}

void Machine::run() {
  std::vector<uint64_t> blocks(static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const uint64_t block : blocks) {
    const uint64_t rest = block / launch.grid.x;
    block_ = {static_cast<unsigned>(block % launch.grid.x), static_cast<unsigned>(rest % launch.grid.y),
              static_cast<unsigned>(rest / launch.grid.y)};
    run_block();
  }
}

void run(const Launch& launch, const Options& options) {
  struct Restore {
    ~Restore() {
      running = machine;
      --running_depth;
    }
    Machine* machine = running;
  };
  Machine machine(launch, options, running_depth + 1);
  const Restore restore;
  running = &machine;
  ++running_depth;
  try {
    machine.run();
  } catch (...) {
    // The fibers are thrown away where they stand.
    for (Fiber& fiber : pool(running_depth).fibers) fiber.started = false;
    throw;
  }
  if (launch.previous != nullptr && !machine.previous_ran) {
    run(*launch.previous, options);
    throw std::runtime_error("a launch that overlaps the previous one ended without previous_launch_wait");
  }
}

void Queue::push(Launch launch, bool overlaps_previous) {
  if (!overlaps_previous) finish();
  if (!options_.late) return run(launch, options_);
  launch.previous = std::move(last_);
  last_ = std::make_shared<const Launch>(std::move(launch));
}

void Queue::finish() {
  if (last_ == nullptr) return;
  const auto launch = std::move(last_);
  last_ = nullptr;
  run(*launch, options_);
}

}  // namespace mixrank::emulator

namespace mixrank {

using emulator::machine;

char* shared_memory() { return machine().shared; }

void previous_launch_wait() {
  auto& m = machine();
  if (m.previous_ran) return;
  m.waiting_for_launch.push_back(m.current);
  m.wait("previous_launch_wait");
}

// The next launch may begin now, but it sees what this one wrote only after previous_launch_wait.
void next_launch_start() { machine(); }

}  // namespace mixrank
