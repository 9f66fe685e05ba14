// From the operands of a Gram operator to launches.
#pragma once

#include "cuda/gram_quad_sm90.h"
#include "cuda/gram_reduce.h"
#include "cuda/gram_sm80.h"
#include "cuda/gram_sm90.h"
#include "cuda/launch.h"

namespace mixrank {

// What the rows are multiplied as: bf16, fp16, or fp32 in two or three terms of bf16.
enum class GramOperand { kBFloat16, kFloat16, kFloat32Two, kFloat32Three };

// Of one call, for at least one row. Access, split and scratch memory are filled in here.
struct GramArguments {
  GramOperand operand;
  GramParams params;
  bool wide_master;  // gram and column_sum are fp64, else fp32
  void* gram;        // [batches, K, N] contiguous
  void* column_sum;  // [batches, K] contiguous, or null
};

enum class GramKernel { kPortable, kTiles, kQuads };

// The kernel, how it divides the rows, and the floats of scratch memory that the sums of a round take.
struct GramPlan {
  GramKernel kernel;
  RowSchedule rows;
  int64_t blocks;  // of each split
  int64_t partials, partial_sums;
};

inline int element_bytes(GramOperand operand) {
  return operand == GramOperand::kBFloat16 || operand == GramOperand::kFloat16 ? 2 : 4;
}

inline int access_of(const GramArguments& call, const void* base, int64_t stride, int64_t batch_stride) {
  const int size = element_bytes(call.operand);
  return access_of(base, (stride | (call.params.batches > 1 ? batch_stride : 0)) * size, size);
}

// From so many tiles along a side on, quads waste little. Not measured.
constexpr int64_t kQuadTiles = 5;

inline GramKernel kernel_of(const GramArguments& call, int architecture) {
  const GramParams& params = call.params;
  const bool boxes = architecture == 90 && element_bytes(call.operand) == 2 && params.weight == nullptr &&
                     params.M < (int64_t{1} << 31) &&
                     access_of(call, params.x, params.x_stride, params.x_batch_stride) == 16 &&
                     access_of(call, params.z, params.z_stride, params.z_batch_stride) == 16;
  if (!boxes) return GramKernel::kPortable;
  return ceil_div(params.K, kGramTile) >= kQuadTiles && ceil_div(params.N, kGramTile) >= kQuadTiles ? GramKernel::kQuads
                                                                                                  : GramKernel::kTiles;
}

inline GramPlan plan_gram(const GramArguments& call, int architecture, bool summing) {
  const GramParams& params = call.params;
  const auto squares = [&](int size) { return gram_squares(params.K, params.N, params.cross, size) * params.batches; };
  const int64_t floats = squares(kGramTile) * kGramTile * kGramTile;
  GramPlan plan;
  plan.kernel = kernel_of(call, architecture);
  const bool quads = plan.kernel == GramKernel::kQuads;
  plan.blocks = quads ? 2 * squares(kGramQuad) : squares(kGramTile);
  plan.rows = row_schedule(params.M, plan.blocks, (quads ? 1 : 2) * kMultiprocessors,
                           kScratchBytes / (floats * static_cast<int64_t>(sizeof(float))));
  plan.partials = plan.rows.round_splits * floats;
  plan.partial_sums = summing ? plan.rows.round_splits * params.batches * round_up(params.K, kGramTile) : 0;
  return plan;
}

template <template <class> class Kernel, class Launcher>
void launch_boxes(Launcher& launcher, GramOperand operand, const GramParams& gram, int64_t blocks) {
  GramSm90Params params{};
  params.gram = gram;
  params.x = launcher.map(gram.x, gram.K, gram.M, gram.batches, gram.x_stride, gram.x_batch_stride, kGramDepth);
  params.z = launcher.map(gram.z, gram.N, gram.M, gram.batches, gram.z_stride, gram.z_batch_stride, kGramDepth);
  if (operand == GramOperand::kBFloat16) {
    launcher.template launch<Kernel<BFloat16>>(blocks, params, false);
  } else {
    launcher.template launch<Kernel<Float16>>(blocks, params, false);
  }
}

template <class Launcher>
void launch_portable(Launcher& launcher, GramOperand operand, const GramParams& params, int64_t blocks) {
  const bool weighted = params.weight != nullptr;
  switch (operand) {
    case GramOperand::kBFloat16:
      if (weighted) return launcher.template launch<GramSm80<BFloat16, true, 2, 1>>(blocks, params, false);
      return launcher.template launch<GramSm80<BFloat16, false, 1, 1>>(blocks, params, false);
    case GramOperand::kFloat16:
      if (weighted) return launcher.template launch<GramSm80<Float16, true, 2, 2>>(blocks, params, false);
      return launcher.template launch<GramSm80<Float16, false, 1, 1>>(blocks, params, false);
    case GramOperand::kFloat32Two:
      if (weighted) return launcher.template launch<GramSm80<Float32<2>, true, 2, 2>>(blocks, params, false);
      return launcher.template launch<GramSm80<Float32<2>, false, 2, 2>>(blocks, params, false);
    case GramOperand::kFloat32Three:
      if (weighted) return launcher.template launch<GramSm80<Float32<3>, true, 3, 3>>(blocks, params, false);
      return launcher.template launch<GramSm80<Float32<3>, false, 3, 3>>(blocks, params, false);
  }
}

// Two launches for each round: the sums of every tile over every split, and their sums, in order, into gram.
template <class Launcher>
void gram(Launcher& launcher, const GramArguments& call, const GramPlan& plan, float* partial, float* partial_sum) {
  GramParams params = call.params;
  params.x_access = access_of(call, params.x, params.x_stride, params.x_batch_stride);
  params.z_access = access_of(call, params.z, params.z_stride, params.z_batch_stride);
  params.split_rows = plan.rows.split_rows;
  params.partial = partial;
  params.partial_sum = call.column_sum != nullptr ? partial_sum : nullptr;
  const int64_t tiles = gram_squares(params.K, params.N, params.cross, kGramTile) * params.batches;
  ReduceParams reduce{partial,  partial_sum, 0, call.gram, call.column_sum, params.K, params.N, params.batches,
                      params.cross};
  for (int64_t first = 0; first < plan.rows.splits; first += plan.rows.round_splits) {
    const int64_t left = plan.rows.splits - first;
    reduce.splits = left < plan.rows.round_splits ? left : plan.rows.round_splits;
    params.first_split = first;
    const int64_t blocks = plan.blocks * reduce.splits;
    if (plan.kernel == GramKernel::kQuads) {
      launch_boxes<GramQuadSm90>(launcher, call.operand, params, blocks);
    } else if (plan.kernel == GramKernel::kTiles) {
      launch_boxes<GramSm90>(launcher, call.operand, params, blocks);
    } else {
      launch_portable(launcher, call.operand, params, blocks);
    }
    if (call.wide_master) {
      launcher.template launch<GramReduce<double>>(tiles * GramReduce<double>::kStrips, reduce, true);
    } else {
      launcher.template launch<GramReduce<float>>(tiles * GramReduce<float>::kStrips, reduce, true);
    }
  }
}

}  // namespace mixrank
