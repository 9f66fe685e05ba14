// Launches, cluster by cluster, and what the blocks of a cluster do together.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "emulator/machine.h"

namespace mixrank::emulator {

Cluster::Cluster(const Launch& launch, const Options& options, int depth)
    : launch(launch),
      options(options),
      random(options.seed),
      previous_ran(launch.previous == nullptr),
      landing_(options.seed % 3 == 0 ? 0 : options.seed % 3 == 1 ? 16 : 256) {
  check();
  for (int rank = 0; rank < launch.cluster; ++rank) order_.push_back(&blocks.emplace_back(*this, depth, rank));
}

void Cluster::check() const {
  const auto require = [](bool holds, const std::string& name, const std::string& was, const std::string& must) {
    if (!holds) throw std::runtime_error(name + " was " + was + ", but must be " + must);
  };
  const auto [x, y, z] = launch.grid;
  require(x >= 1 && x <= 0x7fffffffu && y >= 1 && y <= 65535 && z >= 1 && z <= 65535, "the grid",
          std::to_string(x) + " x " + std::to_string(y) + " x " + std::to_string(z),
          "1 to 2^31 - 1 x 1 to 65535 x 1 to 65535");
  require(launch.threads >= kWarp && launch.threads <= kWarps * kWarp && launch.threads % kWarp == 0, "kThreads",
          std::to_string(launch.threads), "a multiple of 32 up to 1024");
  require(launch.shared_bytes >= 0 && launch.shared_bytes <= kMaxShared, "kSharedBytes",
          std::to_string(launch.shared_bytes), "0 to " + std::to_string(kMaxShared));
  require(launch.cluster >= 1 && launch.cluster <= kMaxCluster, "kCluster", std::to_string(launch.cluster),
          "1 to " + std::to_string(kMaxCluster));
  require(x % launch.cluster == 0, "the grid's x", std::to_string(x),
          "a multiple of the " + std::to_string(launch.cluster) + " blocks of a cluster");
}

void Cluster::begin(Load load) {
  if (options.late) {
    loads.push_back(std::move(load));
  } else {
    load.land();
  }
}

void Cluster::land() {
  std::swap(loads[random() % loads.size()], loads.back());
  const Load load = std::move(loads.back());
  loads.pop_back();
  load.land();
}

size_t Cluster::running() const {
  return std::accumulate(blocks.begin(), blocks.end(), size_t{0},
                         [](size_t sum, const Machine& block) { return sum + block.running; });
}

void Cluster::release() {
  for (const auto& [block, thread] : arrived) block->wake(*thread);
  arrived.clear();
}

Thread* Cluster::choose(Machine** block) {
  if (order_.size() > 1 && random() % period_ == 0) std::shuffle(order_.begin(), order_.end(), random);
  for (Machine* machine : order_) {
    if (machine->running == 0) continue;
    *block = machine;
    if (Thread* thread = machine->choose()) return thread;
  }
  return nullptr;
}

void Cluster::deadlock() const {
  std::string text = "deadlock.";
  if (blocks.size() == 1) blocks.front().fail(text + blocks.front().waits());
  for (const Machine& block : blocks) text += " In " + block.name() + ":" + block.waits();
  throw std::runtime_error(text);
}

void Cluster::run_blocks(uint64_t index) {
  const uint64_t across = launch.grid.x / launch.cluster, rest = index / across;
  const auto first = static_cast<unsigned>(index % across * launch.cluster);
  for (Machine& block : blocks) {
    block.begin({first + block.rank, static_cast<unsigned>(rest % launch.grid.y),
                 static_cast<unsigned>(rest / launch.grid.y)});
  }
  if (blocks.size() > 1) period_ = 32 << random() % 6;
  for (size_t left = blocks.size(); left > 0;) {
    Machine* block;
    Thread* next = choose(&block);
    if (next != nullptr) {
      block->resume(*next);
      if (block->running == 0) {
        block->end();
        --left;
      }
    }
    if (!loads.empty() && (next == nullptr || (landing_ != 0 && random() % landing_ == 0))) {
      land();
    } else if (next == nullptr && waits_for_launch()) {
      run_previous();
    } else if (next == nullptr) {
      deadlock();
    }
  }
}

bool Cluster::waits_for_launch() const {
  return std::any_of(blocks.begin(), blocks.end(),
                     [](const Machine& block) { return !block.waiting_for_launch.empty(); });
}

void Cluster::run_previous() {
  previous_ran = true;
  emulator::run(*launch.previous, options);
  set_grid();
  for (Machine& block : blocks) {
    for (Thread* thread : block.waiting_for_launch) block.wake(*thread);
    block.waiting_for_launch.clear();
  }
}

void Cluster::set_grid() const {
  gridDim = launch.grid;
  blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
}

void Cluster::run() {
  set_grid();
  std::vector<uint64_t> clusters(static_cast<uint64_t>(launch.grid.x) / launch.cluster * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
  std::shuffle(clusters.begin(), clusters.end(), random);
  try {
    for (const uint64_t index : clusters) run_blocks(index);
  } catch (...) {
    for (Machine& block : blocks) block.abandon();
    throw;
  }
}

void run(const Launch& launch, const Options& options) {
  static int depth = 0;
  struct Deeper {
    Deeper() { ++depth; }
    ~Deeper() { --depth; }
  };
  Cluster cluster(launch, options, depth);
  {
    const Deeper deeper;
    cluster.run();
  }
  if (launch.previous != nullptr && !cluster.previous_ran) {
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

using namespace emulator;

void previous_launch_wait() {
  Machine& m = machine();
  if (m.cluster.previous_ran) return;
  m.waiting_for_launch.push_back(m.current);
  m.wait("previous_launch_wait");
}

// The next launch may begin now, but it sees what this one wrote only after previous_launch_wait.
void next_launch_start() { machine(); }

int cluster_rank() { return machine().rank; }

// PTX ISA, barrier.cluster: the wait is for all threads of the cluster that have not ended.
void cluster_barrier() {
  Machine& m = machine();
  if (m.cluster.arrived.size() + 1 == m.cluster.running()) return m.cluster.release();
  m.cluster.arrived.emplace_back(&m, m.current);
  m.wait("cluster_barrier");
}

}  // namespace mixrank
