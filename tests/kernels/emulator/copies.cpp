// Copies into and out of shared memory, and the barriers that wait for them.
#include <algorithm>

#include "emulator/machine.h"

namespace mixrank::emulator {
namespace {

constexpr int kBoxCols = 64;
constexpr int kRowBytes = 128;
constexpr int64_t kMaxPending = (1 << 20) - 1;  // arrivals and bytes of a barrier (PTX ISA, "mbarrier": valid ranges)

void copy(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.valid);
  memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
}

// The address of row `y` of the box in the tensor, or null outside it.
char* row_of(const Box& box, int row) {
  const int64_t y = static_cast<int64_t>(box.y) + row;
  if (y < 0 || y >= box.map->rows || box.z < 0 || box.z >= box.map->batches) return nullptr;
  return box.map->base + box.z * box.map->batch_bytes + y * box.map->row_bytes;
}

// The columns of the box that lie inside the tensor.
std::pair<int, int> cols_of(const Box& box) {
  const int64_t begin = std::clamp<int64_t>(-static_cast<int64_t>(box.x), 0, kBoxCols);
  const int64_t end = std::clamp<int64_t>(box.map->cols - box.x, begin, kBoxCols);
  return {static_cast<int>(begin), static_cast<int>(end)};
}

std::string in_phase(int offset, int parity) {
  return " for parity " + std::to_string(parity) + " of the barrier at byte " + std::to_string(offset);
}

void arrive(Machine& m, Barrier& barrier) {
  if (barrier.pending == 0) {
    m.fail("a barrier of " + std::to_string(barrier.expected) + " arrivals got another one in the same phase");
  }
  --barrier.pending;
  m.advance(barrier);
}

uint32_t check_box(const Machine& m, const void* shared, const TensorMap* map, const char* instruction) {
  if (map == nullptr || reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    m.fail(std::string(instruction) + " got a tensor map that does not lie on a multiple of 64 bytes");
  }
  return m.address(shared, instruction, map->box_rows * kRowBytes, 1024);
}

// The block of this rank of the cluster, which has to be there still.
Machine& block_at(Machine& m, int rank, const char* instruction) {
  const int blocks = static_cast<int>(m.cluster.blocks.size());
  if (rank < 0 || rank >= blocks) {
    m.fail("rank was " + std::to_string(rank) + ", but must be 0 to " + std::to_string(blocks - 1));
  }
  Machine& block = m.cluster.blocks[rank];
  if (block.running == 0) m.fail(std::string(instruction) + " was called for " + block.name() + ", which has ended");
  return block;
}

// The place of a barrier that the copy engine and the other blocks may tell: `barrier`, but in block `to`.
uint32_t told_barrier(const Machine& m, Machine& to, const uint64_t* barrier, const char* instruction) {
  const uint32_t at = m.address(barrier, instruction, sizeof(*barrier), alignof(uint64_t));
  if (!to.barrier(reinterpret_cast<const uint64_t*>(to.shared + at), instruction).fenced) {
    to.fail(std::string(instruction) + " got a barrier without barrier_init_fence");
  }
  return at;
}

}  // namespace

uint32_t Machine::address(const void* pointer, const char* instruction, int64_t bytes, int alignment) const {
  const int64_t offset = static_cast<const char*>(pointer) - shared;
  if (offset < 0 || offset + bytes > launch.shared_bytes) {
    fail(std::string(instruction) + " got " + std::to_string(bytes) + " bytes from byte " + std::to_string(offset) +
         " of shared memory on, which has " + std::to_string(launch.shared_bytes));
  }
  if (offset % alignment != 0) {
    fail(std::string(instruction) + " got byte " + std::to_string(offset) +
         " of shared memory, which must be a multiple of " + std::to_string(alignment));
  }
  return static_cast<uint32_t>(offset);
}

const char* Machine::seen(uint32_t address, int bytes) const {
  if (address + static_cast<int64_t>(bytes) > launch.shared_bytes) {
    fail("wgmma read at byte " + std::to_string(address) + " of shared memory, which has " +
         std::to_string(launch.shared_bytes));
  }
  return (stores_at_once_ ? shared : fenced.data()) + address;
}

void Machine::land(const Box& box) {
  const auto [begin, end] = cols_of(box);
  for (int row = 0; row < box.map->box_rows; ++row) {
    uint16_t values[kBoxCols] = {};
    const char* from = row_of(box, row);
    if (from != nullptr) {
      memcpy(values + begin, from + (static_cast<int64_t>(box.x) + begin) * 2, (end - begin) * sizeof(uint16_t));
    }
    for (int unit = 0; unit < kRowBytes / 16; ++unit) {
      const uint32_t to = swizzled(box.shared + row * kRowBytes + unit * 16);
      bring(to, reinterpret_cast<const char*>(values + unit * 8), 16);
    }
  }
  complete(box.barrier, box.map->box_rows * kRowBytes);
}

void Machine::bring(uint32_t to, const char* from, int bytes) {
  memmove(shared + to, from, bytes);
  memmove(fenced.data() + to, shared + to, bytes);
}

void Machine::complete(uint32_t offset, int bytes) {
  Barrier& barrier = barriers.at(offset);
  barrier.bytes -= bytes;
  advance(barrier);
}

std::vector<char> Machine::rows_of(const Box& box) const {
  std::vector<char> rows(box.map->box_rows * kRowBytes);
  for (size_t i = 0; i < rows.size(); i += 16) {
    memcpy(rows.data() + i, seen(swizzled(box.shared + static_cast<uint32_t>(i)), 16), 16);
  }
  return rows;
}

void Machine::write(const Box& box, const char* rows) const {
  const auto [begin, end] = cols_of(box);
  for (int row = 0; row < box.map->box_rows; ++row) {
    char* to = row_of(box, row);
    if (to == nullptr) continue;
    memcpy(to + (static_cast<int64_t>(box.x) + begin) * 2, rows + row * kRowBytes + begin * 2, (end - begin) * 2);
  }
}

Barrier& Machine::barrier(const uint64_t* pointer, const char* instruction) {
  const uint32_t offset = address(pointer, instruction, sizeof(*pointer), alignof(uint64_t));
  const auto found = barriers.find(offset);
  if (found == barriers.end()) {
    fail(std::string(instruction) + " got byte " + std::to_string(offset) + " of shared memory, where no barrier is");
  }
  if (*pointer != offset) fail("the barrier at byte " + std::to_string(offset) + " was overwritten");
  return found->second;
}

// Ends the phase when nothing is pending in it (PTX ISA, "mbarrier": phase completion).
void Machine::advance(Barrier& barrier) {
  if (barrier.bytes > kMaxPending || barrier.bytes < -kMaxPending) {
    fail("a barrier got more than 2^20 - 1 bytes in one phase");
  }
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

void Machine::sync(int id, int count, const char* instruction) {
  NamedBarrier& barrier = named[id];
  if (barrier.arrived.empty()) barrier.threads = count;
  if (barrier.threads != count) {
    fail(std::string(instruction) + " of " + std::to_string(count) + " threads met one of " +
         std::to_string(barrier.threads) + " on barrier " + std::to_string(id));
  }
  barrier.arrived.push_back(current);
  if (barrier.arrived.size() < static_cast<size_t>(count)) {
    return wait(instruction, " for " + std::to_string(count) + " threads on barrier " + std::to_string(id));
  }
  std::vector<int> of_warp(warps.size());
  for (const Thread* thread : barrier.arrived) ++of_warp[thread->index / kWarp];
  if (std::any_of(of_warp.begin(), of_warp.end(), [](int arrived) { return arrived % kWarp != 0; })) {
    fail(std::string(instruction) + " was passed by a part of a warp");
  }
  for (Thread* thread : barrier.arrived) {
    if (thread != current) wake(*thread);
  }
  barrier.arrived.clear();
}

void sync_block() {
  Machine& m = machine();
  m.sync(0, m.launch.threads, "__syncthreads");
}

void copy_async(void* shared, const void* global, int bytes, int valid) {
  Machine& m = machine();
  m.address(shared, "copy_async", bytes, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    m.fail("copy_async got a source that does not lie on a multiple of its " + std::to_string(bytes) + " bytes");
  }
  if (valid < 0 || valid > bytes) {
    m.fail("valid was " + std::to_string(valid) + ", but must be 0 to " + std::to_string(bytes));
  }
  const Copy made{static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid};
  if (m.options.late) {
    m.thread().copies.back().push_back(made);
  } else {
    copy(made);
  }
}

void copy_wait(int pending) {
  auto& groups = machine().thread().copies;
  const int closed = static_cast<int>(groups.size()) - 1;
  const int done = std::max(closed - pending, 0);
  for (int i = 0; i < done; ++i) std::for_each(groups[i].begin(), groups[i].end(), copy);
  groups.erase(groups.begin(), groups.begin() + done);
}

}  // namespace mixrank::emulator

namespace mixrank {

using namespace emulator;

TensorMap make_map(const void* base, int64_t cols, int64_t rows, int64_t batches, int64_t row_bytes,
                   int64_t batch_bytes, int box_rows) {
  const auto require = [](bool holds, const char* name, int64_t was, const char* must) {
    if (holds) return;
    throw std::runtime_error(std::string(name) + " was " + std::to_string(was) + ", but must be " + must);
  };
  const auto at = reinterpret_cast<intptr_t>(base);
  require(at != 0 && at % 16 == 0, "base", at, "a multiple of 16");
  constexpr auto kSize = "1 to 2^32";
  require(cols >= 1 && cols <= int64_t{1} << 32, "cols", cols, kSize);
  require(rows >= 1 && rows <= int64_t{1} << 32, "rows", rows, kSize);
  require(batches >= 1 && batches <= int64_t{1} << 32, "batches", batches, kSize);
  constexpr auto kStride = "a multiple of 16 from 16 to 2^40 - 16";
  require(row_bytes > 0 && row_bytes % 16 == 0 && row_bytes < int64_t{1} << 40, "row_bytes", row_bytes, kStride);
  require(batch_bytes > 0 && batch_bytes % 16 == 0 && batch_bytes < int64_t{1} << 40, "batch_bytes", batch_bytes,
          kStride);
  require(box_rows >= 1 && box_rows <= 256, "box_rows", box_rows, "1 to 256");
  return {const_cast<char*>(static_cast<const char*>(base)), cols, rows, batches, row_bytes, batch_bytes, box_rows};
}

uint32_t shared_address(const void* shared) { return machine().address(shared, "shared_address", 0, 1); }

void copy_commit() { machine().thread().copies.emplace_back(); }

void named_barrier(int id, int threads) {
  Machine& m = machine();
  if (id < 0 || id > 15) m.fail("id was " + std::to_string(id) + ", but must be 0 to 15");
  if (threads < kWarp || threads % kWarp != 0 || threads > m.launch.threads) {
    m.fail("threads was " + std::to_string(threads) + ", but must be a multiple of 32 up to " +
           std::to_string(m.launch.threads));
  }
  m.sync(id, threads, "named_barrier");
}

void barrier_init(uint64_t* barrier, int arrivals) {
  Machine& m = machine();
  const uint32_t offset = m.address(barrier, "barrier_init", sizeof(*barrier), alignof(uint64_t));
  if (arrivals < 1 || arrivals > kMaxPending) {
    m.fail("arrivals was " + std::to_string(arrivals) + ", but must be 1 to 2^20 - 1");
  }
  if (m.barriers.contains(offset)) m.fail("barrier_init met a barrier at byte " + std::to_string(offset));
  m.barriers[offset] = {arrivals, arrivals, 0, 0, m.thread().index, false, {}};
  *barrier = offset;
}

void barrier_init_fence() {
  Machine& m = machine();
  for (auto& [offset, barrier] : m.barriers) barrier.fenced |= barrier.owner == m.thread().index;
}

void barrier_arrive(uint64_t* barrier) {
  Machine& m = machine();
  arrive(m, m.barrier(barrier, "barrier_arrive"));
}

void barrier_arrive_at(uint64_t* barrier, int rank) {
  Machine& m = machine();
  Machine& to = block_at(m, rank, "barrier_arrive_at");
  arrive(to, to.barriers.at(told_barrier(m, to, barrier, "barrier_arrive_at")));
}

void barrier_expect(uint64_t* barrier, int bytes) {
  Machine& m = machine();
  Barrier& found = m.barrier(barrier, "barrier_expect");
  if (bytes < 0 || bytes > kMaxPending) {
    m.fail("bytes was " + std::to_string(bytes) + ", but must be 0 to 2^20 - 1");
  }
  found.bytes += bytes;
  arrive(m, found);
}

void barrier_wait(uint64_t* barrier, int parity) {
  Machine& m = machine();
  if (parity != 0 && parity != 1) m.fail("parity was " + std::to_string(parity) + ", but must be 0 or 1");
  Barrier& found = m.barrier(barrier, "barrier_wait");
  while (found.phase % 2 == parity) {
    found.waiting.push_back(m.current);
    m.wait("barrier_wait", in_phase(static_cast<int>(*barrier), parity));
  }
}

void prefetch_map(const TensorMap* map) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    machine().fail("prefetch_map got a tensor map that does not lie on a multiple of 64 bytes");
  }
}

void load_box(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
  Machine& m = machine();
  const uint32_t at = check_box(m, shared, map, "load_box");
  const Box box{map, at, told_barrier(m, m, barrier, "load_box"), x, y, z};
  m.cluster.begin({&m, nullptr, [&m, box] { m.land(box); }});
}

void load_box_to_blocks(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z, uint16_t blocks) {
  Machine& m = machine();
  constexpr auto kName = "load_box_to_blocks";
  const int all = (1 << m.cluster.blocks.size()) - 1;
  if (blocks == 0 || blocks > all) {
    m.fail("blocks was " + std::to_string(blocks) + ", but must be 1 to " + std::to_string(all));
  }
  const uint32_t at = check_box(m, shared, map, kName);
  for (int rank = 0; blocks >> rank != 0; ++rank) {
    if ((blocks >> rank) % 2 == 0) continue;
    Machine& to = block_at(m, rank, kName);
    const Box box{map, at, told_barrier(m, to, barrier, kName), x, y, z};
    m.cluster.begin({&to, nullptr, [&to, box] { to.land(box); }});
  }
}

void copy_to_block(const void* shared, uint64_t* barrier, int bytes, int rank) {
  Machine& m = machine();
  constexpr auto kName = "copy_to_block";
  Machine& to = block_at(m, rank, kName);
  if (bytes < 16 || bytes % 16 != 0) {
    m.fail("bytes was " + std::to_string(bytes) + ", but must be a positive multiple of 16");
  }
  const uint32_t at = m.address(shared, kName, bytes, 16);
  const uint32_t told = told_barrier(m, to, barrier, kName);
  m.cluster.begin({&to, &m, [=, &m, &to] {
                     to.bring(at, m.seen(at, bytes), bytes);
                     to.complete(told, bytes);
                   }});
}

void store_box(const TensorMap* map, const void* shared, int x, int y, int z) {
  Machine& m = machine();
  const Box box{map, check_box(m, shared, map, "store_box"), 0, x, y, z};
  if (!m.options.late) m.write(box, m.rows_of(box).data());
  m.thread().stores.push_back(box);
}

void store_wait() {
  Machine& m = machine();
  if (m.options.late) {
    for (const Box& box : m.thread().stores) m.stores.emplace_back(box, m.rows_of(box));
  }
  m.thread().stores.clear();
}

void async_fence() {
  Machine& m = machine();
  memcpy(m.fenced.data(), m.shared, m.fenced.size());
}

}  // namespace mixrank
