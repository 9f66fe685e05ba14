// From the operands of a Gram operator to launches; Launcher as in launch_product.h.
#pragma once

#include "cuda/gram_reduce.h"
#include "cuda/gram_sm80.h"
#include "cuda/gram_sm90.h"
#include "cuda/launch_product.h"

namespace mixrank {

// What the rows are multiplied as: bf16, fp16, or fp32 in two or three terms of bf16.
enum class GramOperand { kBFloat16, kFloat16, kFloat32Two, kFloat32Three };

// Of one call, for at least one row. x_access and z_access are set here, as are the split and the scratch memory.
struct GramArguments {
  GramOperand operand;
  GramParams params;
  bool wide_master;  // gram and column_sum are fp64, else fp32
  void* gram;        // [batches, K, N] contiguous
  void* column_sum;  // [batches, K] contiguous, or null
};

// How the rows are divided, and the floats of scratch memory that the sums of a round take.
struct GramPlan {
  RowSchedule rows;
  int64_t partials, partial_sums;
};

inline GramPlan plan_gram(const GramParams& params, bool summing) {
  const int64_t tiles = GramTile::tiles(params.K, params.N, params.cross) * params.batches;
  const int64_t tile_bytes = kGramTile * kGramTile * static_cast<int64_t>(sizeof(float));
  GramPlan plan;
  plan.rows = row_schedule(params.M, tiles, kScratchBytes / (tiles * tile_bytes));
  plan.partials = plan.rows.round_splits * tiles * kGramTile * kGramTile;
  plan.partial_sums = summing ? plan.rows.round_splits * params.batches * round_up(params.K, kGramTile) : 0;
  return plan;
}

inline bool boxes_reach(const GramParams& params) {
  return params.weight == nullptr && params.x_access == 16 && params.z_access == 16 && params.M < (int64_t{1} << 31);
}

template <class Operand, class Launcher>
void launch_boxes(Launcher& launcher, const GramParams& params, int64_t blocks) {
  GramSm90Params with_maps{};
  with_maps.gram = params;
  with_maps.x = launcher.map(params.x, params.K, params.M, params.batches, params.x_stride, params.x_batch_stride, kGramDepth);
  with_maps.z = launcher.map(params.z, params.N, params.M, params.batches, params.z_stride, params.z_batch_stride, kGramDepth);
  launcher.template launch<GramSm90<Operand>>(blocks, with_maps, false);
}

template <class Launcher>
void gram_partial(Launcher& launcher, GramOperand operand, const GramParams& params, int64_t blocks) {
  const bool weighted = params.weight != nullptr, boxes = launcher.architecture() == 90 && boxes_reach(params);
  switch (operand) {
    case GramOperand::kBFloat16:
      if (boxes) return launch_boxes<BFloat16>(launcher, params, blocks);
      if (weighted) return launcher.template launch<GramSm80<BFloat16, true, 2, 1>>(blocks, params, false);
      return launcher.template launch<GramSm80<BFloat16, false, 1, 1>>(blocks, params, false);
    case GramOperand::kFloat16:
      if (boxes) return launch_boxes<Float16>(launcher, params, blocks);
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
  const int size = call.operand == GramOperand::kBFloat16 || call.operand == GramOperand::kFloat16 ? 2 : 4;
  const auto access = [&](const void* base, int64_t stride, int64_t batch_stride) {
    return access_of(base, (stride | (params.batches > 1 ? batch_stride : 0)) * size, size);
  };
  params.x_access = access(params.x, params.x_stride, params.x_batch_stride);
  params.z_access = access(params.z, params.z_stride, params.z_batch_stride);
  params.split_rows = plan.rows.split_rows;
  params.partial = partial;
  params.partial_sum = call.column_sum != nullptr ? partial_sum : nullptr;
  const int64_t tiles = GramTile::tiles(params.K, params.N, params.cross) * params.batches;
  ReduceParams reduce{partial,  partial_sum, 0, call.gram, call.column_sum, params.K, params.N, params.batches,
                      params.cross};
  for (int64_t first = 0; first < plan.rows.splits; first += plan.rows.round_splits) {
    const int64_t left = plan.rows.splits - first;
    reduce.splits = left < plan.rows.round_splits ? left : plan.rows.round_splits;
    params.first_split = first;
    gram_partial(launcher, call.operand, params, tiles * reduce.splits);
    if (call.wide_master) {
      launcher.template launch<GramReduce<double>>(tiles * GramReduce<double>::kStrips, reduce, true);
    } else {
      launcher.template launch<GramReduce<float>>(tiles * GramReduce<float>::kStrips, reduce, true);
    }
  }
}

}  // namespace mixrank
