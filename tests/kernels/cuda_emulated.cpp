// The CUDA kernels on the emulator, through the same host code that launches them on a device: C functions for
// cuda_emulated.py. Sizes and pointers come as arrays, in the order that the functions read them in.
#include <cxxabi.h>

#include <cstdlib>
#include <string>
#include <typeinfo>

#include "cuda/launch_gram.h"
#include "cuda/launch_product.h"
#include "emulator/emulator.h"

namespace {

using namespace mixrank;

// Names of kernels, one a line: all that the launch code can reach, and those of the last call in their order.
constinit std::string reachable;
constinit std::string launched;

// Every instance of Launcher::launch names its kernel when the library is loaded.
template <class Kernel>
const char* const kName = [] {
  const char* name = abi::__cxa_demangle(typeid(Kernel).name(), nullptr, nullptr, nullptr);
  reachable += std::string(name) + "\n";
  return name;
}();

class Launcher {
 public:
  Launcher(int64_t architecture, int64_t late, int64_t seed)
      : architecture_(static_cast<int>(architecture)), queue_({late != 0, static_cast<uint64_t>(seed)}) {
    launched.clear();
  }

  int architecture() const { return architecture_; }

  TensorMap map(const void* base, int64_t cols, int64_t rows, int64_t batches, int64_t row_stride, int64_t batch_stride,
                int box_rows) const {
    return make_map(base, cols, rows, batches, row_stride * 2, (batches > 1 ? batch_stride : row_stride) * 2, box_rows);
  }

  template <class Kernel>
  void launch(int64_t blocks, const typename Kernel::Params& params, bool overlaps) {
    launched += std::string(kName<Kernel>) + "\n";
    queue_.launch<Kernel>(blocks, 1, 1, params, overlaps);
  }

  void finish() { queue_.finish(); }

 private:
  int architecture_;
  emulator::Queue queue_;
};

}  // namespace

extern "C" {

const char* kernels_reachable() { return reachable.c_str(); }
const char* kernels_launched() { return launched.c_str(); }

int64_t linear_hidden_stride(int64_t R, int64_t Q) { return hidden_stride(static_cast<int>(R), static_cast<int>(Q)); }

// sizes: architecture, late, seed, operand, M, K, N, x_stride, R, down_stride, up_stride, Q, residual_down_stride,
// residual_up_stride, block size, wide indices, aligned, launches, tile. pointers: x, down, up, residual_down, residual_up, bias, crow, col,
// values, hidden, y.
const char* linear_emulated(const int64_t* sizes, void* const* pointers) {
  return emulator::message_of([&] {
    LinearArguments call{};
    call.operand = static_cast<LinearOperand>(sizes[3]);
    call.M = sizes[4];
    call.K = static_cast<int>(sizes[5]);
    call.N = static_cast<int>(sizes[6]);
    call.x = pointers[0];
    call.x_stride = sizes[7];
    call.factors[0] = {static_cast<int>(sizes[8]), pointers[1], pointers[2], sizes[9], sizes[10]};
    call.factors[1] = {static_cast<int>(sizes[11]), pointers[3], pointers[4], sizes[12], sizes[13]};
    call.bias = pointers[5];
    call.sparse = {pointers[0], sizes[7], pointers[8], pointers[6], pointers[7], sizes[15] != 0, sizes[16] != 0,
                   static_cast<int>(sizes[14])};
    call.hidden = pointers[9];
    call.y = pointers[10];
    Launcher launcher(sizes[0], sizes[1], sizes[2]);
    linear(launcher, call, {static_cast<int>(sizes[17]), static_cast<ProductTile>(sizes[18])});
    launcher.finish();
  });
}

namespace {

// sizes: architecture, late, seed, operand, batches, M, K, N, x_batch_stride, x_stride, z_batch_stride, z_stride, cross, wide
// master, at most so many splits in a round or 0, summing.
//
// pointers: gram, x, z, row_weight, column_sum, partial, partial_sum.
GramArguments gram_arguments(const int64_t* sizes, void* const* pointers) {
  GramArguments call{};
  call.operand = static_cast<GramOperand>(sizes[3]);
  call.wide_master = sizes[13] != 0;
  GramParams& params = call.params;
  params.batches = static_cast<int>(sizes[4]);
  params.M = sizes[5];
  params.K = static_cast<int>(sizes[6]);
  params.N = static_cast<int>(sizes[7]);
  params.x_batch_stride = sizes[8];
  params.x_stride = sizes[9];
  params.z_batch_stride = sizes[10];
  params.z_stride = sizes[11];
  params.cross = sizes[12] != 0;
  call.gram = pointers[0];
  params.x = pointers[1];
  params.z = pointers[2];
  params.weight = static_cast<const float*>(pointers[3]);
  call.column_sum = pointers[4];
  return call;
}

GramPlan gram_plan(const int64_t* sizes, void* const* pointers) {
  GramPlan plan = plan_gram(gram_arguments(sizes, pointers), static_cast<int>(sizes[0]), sizes[15] != 0);
  if (sizes[14] > 0 && sizes[14] < plan.rows.round_splits) plan.rows.round_splits = sizes[14];
  return plan;
}

}  // namespace

// planned: split_rows, splits, round_splits, partials, partial_sums. Of the pointers those of the operands count.
void gram_planned(const int64_t* sizes, void* const* pointers, int64_t* planned) {
  const GramPlan plan = gram_plan(sizes, pointers);
  const int64_t values[] = {plan.rows.split_rows, plan.rows.splits, plan.rows.round_splits, plan.partials,
                            plan.partial_sums};
  for (int i = 0; i < 5; ++i) planned[i] = values[i];
}

const char* gram_emulated(const int64_t* sizes, void* const* pointers) {
  return emulator::message_of([&] {
    Launcher launcher(sizes[0], sizes[1], sizes[2]);
    gram(launcher, gram_arguments(sizes, pointers), gram_plan(sizes, pointers), static_cast<float*>(pointers[5]), static_cast<float*>(pointers[6]));
    launcher.finish();
  });
}

// The functions of schedule.h, for their own tests.
void schedule_triangle(int64_t index, int64_t* tile) {
  const Tile found = triangle_tile(index);
  tile[0] = found.row, tile[1] = found.col;
}

void schedule_rectangle(int64_t index, int64_t cols, int64_t* tile) {
  const Tile found = rectangle_tile(index, static_cast<int>(cols));
  tile[0] = found.row, tile[1] = found.col;
}

void schedule_rows(int64_t rows, int64_t blocks, int64_t slots, int64_t most, int64_t* schedule) {
  const RowSchedule found = row_schedule(rows, blocks, slots, most);
  schedule[0] = found.split_rows, schedule[1] = found.splits, schedule[2] = found.round_splits;
}

// Where block `block` of a Gram launch works: split, batch, row and col of squares of `size`, first and last row.
void schedule_gram(int64_t batches, int64_t rows, int64_t K, int64_t N, int64_t cross, int64_t size, int64_t split_rows,
                   int64_t first_split, int64_t block, int64_t* where) {
  GramParams params{};
  params.batches = static_cast<int>(batches);
  params.M = rows;
  params.K = static_cast<int>(K);
  params.N = static_cast<int>(N);
  params.cross = cross != 0;
  params.split_rows = split_rows;
  params.first_split = first_split;
  const GramTile found = GramTile::of(params, block, static_cast<int>(size));
  const int64_t values[] = {found.split,  found.batch,     found.at.row,
                            found.at.col, found.first_row, found.last_row};
  for (int i = 0; i < 6; ++i) where[i] = values[i];
}

// For a product of one output of two terms, or of two outputs of one term each: output, row and column of tiles of block
// `block`, the number of chunks of its sum, and term and depth of each.
void schedule_product(int64_t outputs, const int64_t* N, const int64_t* depth, int64_t cols, int64_t depth_step,
                      int64_t block, int64_t* where) {
  ProductParams params{};
  params.output_count = static_cast<int>(outputs);
  params.term_count = outputs == 2 ? 1 : 2;
  for (int i = 0; i < 2; ++i) {
    params.outputs[i].N = static_cast<int>(N[i]);
    params.terms[i].depth = static_cast<int>(depth[i]);
  }
  const OutputTile found = output_tile(params, block, static_cast<int>(cols));
  const int count = chunk_count(params, found.output, static_cast<int>(depth_step));
  where[0] = found.output, where[1] = found.tile.row, where[2] = found.tile.col, where[3] = count;
  for (int i = 0; i < count; ++i) {
    const Chunk chunk = chunk_at(params, found.output, i, static_cast<int>(depth_step));
    where[4 + 2 * i] = chunk.term, where[5 + 2 * i] = chunk.depth;
  }
}

}  // extern "C"
