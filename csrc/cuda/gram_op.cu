// _cuda_gram_: the Gram operators on CUDA tensors that mixrank_kernels.cuda has brought into form.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "cuda/launch_gram.h"
#include "cuda/launcher.cuh"

namespace mixrank {
namespace {

constexpr char kOp[] = "_cuda_gram_";
using Optional = std::optional<Tensor>;

GramOperand operand_of(Dtype dtype, int64_t terms) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return GramOperand::kBFloat16;
    case Dtype::kFloat16:
      return GramOperand::kFloat16;
    case Dtype::kFloat32:
      return terms == 2 ? GramOperand::kFloat32Two : GramOperand::kFloat32Three;
    default:
      check(false, kOp, ": x must be bfloat16, float16 or float32, but it was float64");
      return GramOperand::kBFloat16;
  }
}

void check_rows(const char* argument, const Tensor& tensor) {
  check(tensor.dim() == 3 && tensor.size(0) > 0 && tensor.size(1) > 0 && tensor.size(2) > 0, kOp, ": ", argument,
        " must have shape [B, M, K], nowhere zero, but it had shape ", shape_of(tensor));
  check(tensor.size(2) == 1 || tensor.stride(2) == 1, kOp, ": ", argument, " must have adjacent elements in its rows");
  check(tensor.size(2) < std::numeric_limits<int>::max() && tensor.size(0) < std::numeric_limits<int>::max(), kOp, ": ",
        argument, " must have sizes below 2^31");
}

void cuda_gram_(Tensor gram,                  // [B, K, N]
                const Tensor& x,              // [B, M, K]
                const Optional& z,            // [B, M, N]; absent for the Gram matrix of x
                const Optional& row_weight,   // [B, M], fp32
                const Optional& column_sum,   // [B, K], as gram
                int64_t terms) {              // of bf16 in an fp32 value, 2 or 3
  check_rows("x", x);
  check(terms == 2 || terms == 3, kOp, ": terms must be 2 or 3, but it was ", terms);
  const Tensor& right = z ? *z : x;
  if (z) {
    check_rows("z", *z);
    check_dtype(kOp, "z", *z, x, "x");
    check_device(kOp, "z", *z, x, "x");
    check(z->size(0) == x.size(0) && z->size(1) == x.size(1) && !row_weight && !column_sum, kOp,
          ": z must have the batches and rows of x, and goes without weights and column sums");
  }
  GramArguments call{};
  call.operand = operand_of(checked_dtype(kOp, "x", x), terms);
  call.wide_master = checked_dtype(kOp, "gram", gram, true) == Dtype::kFloat64;
  GramParams& params = call.params;
  params.batches = static_cast<int>(x.size(0));
  params.M = x.size(1);
  params.K = static_cast<int>(x.size(2));
  params.N = static_cast<int>(right.size(2));
  params.cross = z.has_value();
  params.x = x.const_data_ptr();
  params.z = right.const_data_ptr();
  params.x_batch_stride = x.stride(0);
  params.x_stride = x.stride(1);
  params.z_batch_stride = right.stride(0);
  params.z_stride = right.stride(1);
  check(gram.dim() == 3 && gram.size(0) == params.batches && gram.size(1) == params.K && gram.size(2) == params.N, kOp,
        ": gram must have shape [B, K, N], but it had shape ", shape_of(gram));
  check_contiguous(kOp, "gram", gram);
  check_device(kOp, "gram", gram, x, "x");
  call.gram = gram.mutable_data_ptr();
  if (row_weight) {
    check(row_weight->dim() == 2 && row_weight->size(0) == params.batches && row_weight->size(1) == params.M &&
              row_weight->scalar_type() == torch::headeronly::ScalarType::Float,
          kOp, ": row_weight must be float32 of shape [B, M], but it had shape ", shape_of(*row_weight));
    check_contiguous(kOp, "row_weight", *row_weight);
    check_device(kOp, "row_weight", *row_weight, x, "x");
    params.weight = static_cast<const float*>(row_weight->const_data_ptr());
  }
  if (column_sum) {
    check(column_sum->dim() == 2 && column_sum->size(0) == params.batches && column_sum->size(1) == params.K, kOp,
          ": column_sum must have shape [B, K], but it had shape ", shape_of(*column_sum));
    check_contiguous(kOp, "column_sum", *column_sum);
    check_dtype(kOp, "column_sum", *column_sum, gram, "gram");
    check_device(kOp, "column_sum", *column_sum, x, "x");
    call.column_sum = column_sum->mutable_data_ptr();
  }
  Launcher launcher(x);
  const GramPlan plan = plan_gram(call, launcher.architecture(), column_sum.has_value());
  const Tensor scratch = torch::stable::new_empty(x, {plan.partials + plan.partial_sums},
                                                  torch::headeronly::ScalarType::Float);
  float* partial = static_cast<float*>(scratch.mutable_data_ptr());
  mixrank::gram(launcher, call, plan, partial, partial + plan.partials);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mixrank_kernels, m) {
  m.def(
      "_cuda_gram_(Tensor(a!) gram, Tensor x, Tensor? z, Tensor? row_weight, Tensor(b!)? column_sum, int terms) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mixrank_kernels, CUDA, m) { m.impl("_cuda_gram_", TORCH_BOX(&cuda_gram_)); }

}  // namespace mixrank
