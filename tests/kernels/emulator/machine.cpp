// A block: its fibers, and the order in which they run.
#include "emulator/machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
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

}  // namespace

// Stacks and shared memory of a block, used again by launch after launch. A launch that runs inside another one has its
// own.
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

namespace {

Pool& pool(int depth, int rank) {
  static std::map<std::pair<int, int>, Pool> pools;
  return pools[{depth, rank}];
}

Machine* active = nullptr;
Pool* active_pool;
// Saved without the signal mask, which swapcontext would save with a system call at each switch.
jmp_buf scheduler;

[[noreturn]] void to_scheduler() { _longjmp(scheduler, 1); }

// A fiber runs one thread after the other, so that a context is made once for all launches.
void fiber_main() {
  for (;;) {
    try {
      active->launch.thread();
      active->end_thread();
    } catch (...) {
      active->error = std::current_exception();
    }
    Fiber& fiber = active_pool->fibers[active->thread().index];
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
  if (active == nullptr) throw std::runtime_error("an instruction of a kernel was called outside a launch");
  return *active;
}

Machine::Machine(Cluster& cluster, int depth, int rank)
    : cluster(cluster),
      launch(cluster.launch),
      options(cluster.options),
      rank(rank),
      shared(pool(depth, rank).shared),
      pool_(pool(depth, rank)),
      stores_at_once_(options.seed % 2 == 1) {}

std::string Machine::name() const {
  return "block (" + std::to_string(block_.x) + ", " + std::to_string(block_.y) + ", " + std::to_string(block_.z) + ")";
}

void Machine::fail(const std::string& sentence) const {
  const std::string thread = current == nullptr ? "" : ", thread " + std::to_string(current->index);
  throw std::runtime_error(name() + thread + ": " + sentence);
}

void Machine::wait(const char* instruction, std::string detail) {
  current->waits_in = instruction;
  current->waits_for = std::move(detail);
  Fiber& fiber = pool_.fibers[current->index];
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

void Machine::begin(const uint3& block) {
  block_ = block;
  running = launch.threads;
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
  std::shuffle(order_.begin(), order_.end(), cluster.random);
  period_ = 32 << cluster.random() % 6;
  barriers.clear();
  for (NamedBarrier& barrier : named) barrier = {};
  memset(shared - kMargin, kUntouched, kMargin);
  memset(shared, 0xFF, launch.shared_bytes);
  memset(shared + launch.shared_bytes, kUntouched, kMargin);
  fenced.assign(launch.shared_bytes, '\xFF');
}

void Machine::end_thread() {
  if (!current->stores.empty()) fail("the thread ended without store_wait after its store_box");
  if (warp().added < warp().issued) fail("the thread ended without group_wait for all its products");
  current->ended = true;
  --running;
  if (cluster.arrived.size() == cluster.running()) cluster.release();
}

void Machine::end() {
  int boxes = 0, copies = 0;
  for (const Load& load : cluster.loads) {
    boxes += load.to == this && load.from == nullptr;
    copies += load.from != nullptr && (load.to == this || load.from == this);
  }
  if (boxes > 0) fail(std::to_string(boxes) + " boxes were on their way when the block ended");
  if (copies > 0) fail(std::to_string(copies) + " copies to or from the block were on their way when it ended");
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
  if (cluster.random() % period_ == 0) std::shuffle(order_.begin(), order_.end(), cluster.random);
  for (const int index : order_) {
    Warp& warp = warps[index];
    if (warp.ready == 0) continue;
    const int shift = static_cast<int>(cluster.random() % kWarp);
    const uint32_t turned = warp.ready >> shift | warp.ready << (-shift & 31);
    const int lane = (__builtin_ctz(turned) + shift) % kWarp;
    warp.ready &= ~(1u << lane);
    return &threads[index * kWarp + lane];
  }
  return nullptr;
}

void Machine::resume(Thread& thread) {
  current = &thread;
  active = this;
  active_pool = &pool_;
  threadIdx = {static_cast<unsigned>(thread.index), 0, 0};
  blockIdx = block_;
  if (_setjmp(scheduler) == 0) {
    enter(pool_.fibers[thread.index], pool_.stacks + thread.index * (kStack + kGuard) + kGuard);
  }
  active = nullptr;
  current = nullptr;
  if (error) std::rethrow_exception(error);
}

void Machine::abandon() {
  for (Fiber& fiber : pool_.fibers) fiber.started = false;
}

std::string Machine::waits() const {
  std::map<std::string, int> waiting;
  int ended = 0;
  for (const Thread& thread : threads) {
    if (thread.ended) {
      ++ended;
    } else {
      ++waiting[std::string(thread.waits_in) + thread.waits_for];
    }
  }
  std::string text;
  for (const auto& [what, count] : waiting) text += " " + std::to_string(count) + " threads wait in " + what + ".";
  if (ended != 0) text += " " + std::to_string(ended) + " threads have ended.";
  return text;
}

}  // namespace mixrank::emulator

namespace mixrank {

using emulator::machine;

char* shared_memory() { return machine().shared; }

}  // namespace mixrank
