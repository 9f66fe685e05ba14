// The blocks of a launch that run: their threads, what they wait for, and what is on its way in memory. Private to the
// emulator.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator/emulator.h"

namespace mixrank::emulator {

constexpr int kWarp = 32;
constexpr int kWarps = 32;              // of a block, at most
constexpr int kMaxCluster = 8;          // the largest that every GPU with clusters has
constexpr int kMaxShared = 227 * 1024;  // bytes that a block can have on sm_90
constexpr int kMargin = 4096;           // bytes before and behind shared memory that nobody may change
constexpr uint32_t kWholeWarp = 0xffffffffu;

struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
};

struct Box {
  const TensorMap* map;
  uint32_t shared;
  uint32_t barrier;  // of loads only
  int x, y, z;
};

// Sums of one thread that products of wgmma add to.
struct Sums {
  float* registers;
  std::vector<float> values;  // the sums so far: the registers hold NaN while products are on their way
  int pending;
};

struct Thread {
  int index;
  bool ended;
  const char* waits_in;  // the instruction, or null
  std::string waits_for;
  std::vector<std::vector<Copy>> copies;  // groups, the last one still open
  std::vector<Box> stores;
  std::vector<Sums> sums;
};

// A product of wgmma: of a warpgroup, issued warp by warp.
struct GroupProduct {
  uint64_t a, b;
  int count;
  bool across_rows, bf16;
  int issued;                  // warps
  std::vector<float> values;   // [64, N] once it was computed
  float* sums[4 * kWarp];      // of each thread
  bool added[4];               // to the sums of the warp
};

struct Warpgroup {
  std::vector<std::unique_ptr<GroupProduct>> products;
  std::vector<Thread*> waiting;  // for other warps to issue
};

struct Warp {
  uint32_t ready;    // lanes that can go on
  uint32_t arrived;  // lanes that are in `instruction`
  const char* instruction;
  const void* operands[kWarp];
  bool fenced;                      // group_fence since the last group_wait
  size_t issued, added;             // products of the warpgroup
  std::vector<size_t> committed;    // products before the end of each group
};

struct Barrier {
  int expected, pending;
  int64_t bytes;  // on their way; negative when they came before they were expected
  int phase;
  int owner;    // the thread that initialised it
  bool fenced;  // for the copy engine
  std::vector<Thread*> waiting;
};

struct NamedBarrier {
  int threads;
  std::vector<Thread*> arrived;
};

class Machine;

// A box or a copy to a block on its way.
struct Load {
  const Machine* to;
  const Machine* from;  // null: from a tensor
  std::function<void()> land;
};

class Cluster;
struct Pool;

// One block.
class Machine {
 public:
  Machine(Cluster& cluster, int depth, int rank);

  void begin(const uint3& block);
  void end();
  // A thread that can go on, or null.
  Thread* choose();
  void resume(Thread& thread);
  // The fibers are thrown away where they stand.
  void abandon();
  // What the threads wait for.
  std::string waits() const;
  std::string name() const;

  [[noreturn]] void fail(const std::string& sentence) const;
  // Until another thread has called wake for this one.
  void wait(const char* instruction, std::string detail = {});
  void wake(Thread& thread);

  Thread& thread() { return *current; }
  Warp& warp() { return warps[current->index / kWarp]; }
  int lane() const { return current->index % kWarp; }

  // An instruction of the whole warp: the last lane to come does it for all, with the operands of each.
  template <class Operands, class Act>
  void collective(const char* instruction, const Operands& operands, Act act) {
    if (!arrive(instruction, &operands)) return;
    act(reinterpret_cast<const Operands* const*>(warp().operands));
    release();
  }

  uint32_t address(const void* pointer, const char* instruction, int64_t bytes, int alignment) const;
  Barrier& barrier(const uint64_t* pointer, const char* instruction);
  void advance(Barrier& barrier);
  void land(const Box& box);
  // What the copy engine brings, and tells the barrier.
  void bring(uint32_t to, const char* from, int bytes);
  void complete(uint32_t barrier, int bytes);
  void write(const Box& box, const char* rows) const;
  std::vector<char> rows_of(const Box& box) const;
  void sync(int id, int threads, const char* instruction);
  void wait_for_products(int pending);
  void compute(GroupProduct& product) const;
  void add(GroupProduct& product, int warp_of_group, int first_thread);
  void end_thread();
  // What the tensor cores and the copy engine see.
  const char* seen(uint32_t address, int bytes) const;

  Cluster& cluster;
  const Launch& launch;
  const Options& options;
  const int rank;
  int running = 0;  // threads that have not ended
  Thread* current = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> groups;
  std::map<uint32_t, Barrier> barriers;
  NamedBarrier named[16];
  std::vector<std::pair<Box, std::vector<char>>> stores;  // read, not yet written
  std::vector<Thread*> waiting_for_launch;
  char* shared;
  std::vector<char> fenced;  // shared memory as it was at the last async_fence, and what boxes brought since
  std::exception_ptr error;

 private:
  bool arrive(const char* instruction, const void* operands);
  void release();

  Pool& pool_;
  const bool stores_at_once_;  // plain stores are seen without an async_fence
  uint3 block_{};
  std::vector<int> order_;  // of the warps: the first one that can go on does
  int period_ = 1;          // switches between changes of the order, on average
};

// The blocks of a launch that run at the same time: one, or those of a cluster.
class Cluster {
 public:
  Cluster(const Launch& launch, const Options& options, int depth);

  void run();

  // Brings a load now or, with `late`, later.
  void begin(Load load);
  // Threads that have not ended.
  size_t running() const;
  // Ends the cluster_barrier that all of those have arrived at.
  void release();

  const Launch& launch;
  const Options options;
  std::mt19937_64 random;
  std::deque<Machine> blocks;  // by rank
  std::vector<Load> loads;
  std::vector<std::pair<Machine*, Thread*>> arrived;  // at cluster_barrier
  bool previous_ran;

 private:
  void check() const;
  void run_blocks(uint64_t index);
  void run_previous();
  void set_grid() const;
  bool waits_for_launch() const;
  Thread* choose(Machine** block);
  void land();
  [[noreturn]] void deadlock() const;

  const int landing_;              // a load lands at one in so many switches, or at 0 when every thread waits
  std::vector<Machine*> order_{};  // the first one with a thread that can go on does
  int period_ = 1;                 // switches between changes of the order, on average
};

// The block whose thread runs.
Machine& machine();

// 128-byte swizzle, of tensor maps (CU_TENSOR_MAP_SWIZZLE_128B) and of wgmma alike: bits 4 to 6 of the address in
// shared memory are those of the plain layout, XORed with bits 7 to 9 (PTX ISA, tensors, swizzling modes; CuTe's
// Swizzle<3, 4, 3>).
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

}  // namespace mixrank::emulator
