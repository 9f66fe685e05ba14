#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "cpu/isa.h"
#include "cpu/scalar.h"

namespace mixrank {
namespace {

constexpr char kOp[] = "gram_accumulate_";

double element(const void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<const float*>(data)[index];
    case Dtype::kFloat64:
      return static_cast<const double*>(data)[index];
    case Dtype::kBFloat16:
      return widen(static_cast<const BFloat*>(data)[index]);
    case Dtype::kFloat16:
      return widen(static_cast<const Half*>(data)[index]);
  }
  return 0;
}

// The weights as one row each, of any strides, in the kernel's own dtype.
template <class Acc>
std::vector<Acc> gathered_weights(const Tensor& row_weight, Dtype dtype, int64_t count) {
  std::vector<Acc> weights(count);
  const void* data = row_weight.const_data_ptr();
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = i, offset = 0;
    for (int64_t d = row_weight.dim() - 1; d >= 0; --d) {
      offset += rest % row_weight.size(d) * row_weight.stride(d);
      rest /= row_weight.size(d);
    }
    weights[i] = static_cast<Acc>(element(data, dtype, offset));
  }
  return weights;
}

void gram_accumulate_(Tensor gram,                                // [K, K] or [B, K, K]
                      const Tensor& x,                            // [..., K] or [B, M, K]
                      const std::optional<Tensor>& row_weight,    // x.shape[:-1]
                      const std::optional<Tensor>& column_sum) {  // [K] or [B, K]
  GramParams params{};
  params.gram_dtype = checked_dtype(kOp, "gram", gram, true);
  params.dtype = checked_dtype(kOp, "x", x);
  const int64_t dims = gram.dim(), K = dims > 0 ? gram.size(dims - 1) : 0;
  const bool batched = dims == 3;
  if (!((dims == 2 || batched) && gram.size(dims - 2) == K)) bad_shape(kOp, "gram", "[K, K] or [B, K, K]", gram);
  check_contiguous(kOp, "gram", gram);
  check(K >= 1, kOp, ": gram must have at least one row, but it had none");
  const int64_t last = x.dim() >= 1 ? x.size(x.dim() - 1) : -1;
  if (batched) {
    if (!(x.dim() == 3 && x.size(0) == gram.size(0) && last == K))
      bad_shape(
          kOp, "x",
          "[B, M, K] with B = " + std::to_string(gram.size(0)) + " and K = " + std::to_string(K) + " (as gram has)", x);
  } else {
    if (!(last == K)) bad_shape(kOp, "x", "[..., K] with K = " + std::to_string(K) + " (the size of gram)", x);
  }
  check(gram.is_cpu(), kOp, ": gram must be on cpu as the other arguments are");
  check_device(kOp, "x", x, gram, "gram");
  check_no_overlap(kOp, "gram", gram, "x", x);

  const RowsView rows(x);
  params.x = rows.view();
  params.batches = 1;
  if (batched) {
    params.batches = x.size(0);
    params.x_batch_stride = x.stride(0);
    params.x = {x.const_data_ptr(), x.size(1), K, x.stride(1), x.stride(2), nullptr};
  }
  std::vector<float> float_weights;
  std::vector<double> double_weights;
  if (row_weight) {
    const Dtype weight_dtype = checked_dtype(kOp, "row_weight", *row_weight);
    const auto wanted = x.sizes().slice(0, x.dim() - 1), found = row_weight->sizes();
    const std::vector<int64_t> shape(wanted.begin(), wanted.end());
    if (!(shape == std::vector<int64_t>(found.begin(), found.end())))
      bad_shape(kOp, "row_weight", shape_text(shape) + " (one weight for each row of x)", *row_weight);
    check_device(kOp, "row_weight", *row_weight, gram, "gram");
    check_no_overlap(kOp, "gram", gram, "row_weight", *row_weight);
    const int64_t count = params.x.rows * params.batches;
    if (params.dtype == Dtype::kFloat64) {
      double_weights = gathered_weights<double>(*row_weight, weight_dtype, count);
      params.row_weight = double_weights.data();
    } else {
      float_weights = gathered_weights<float>(*row_weight, weight_dtype, count);
      params.row_weight = float_weights.data();
    }
  }
  if (column_sum) {
    const std::vector<int64_t> shape = batched ? std::vector<int64_t>{gram.size(0), K} : std::vector<int64_t>{K};
    const auto found = column_sum->sizes();
    if (!(shape == std::vector<int64_t>(found.begin(), found.end())))
      bad_shape(kOp, "column_sum", shape_text(shape), *column_sum);
    check_contiguous(kOp, "column_sum", *column_sum);
    check_device(kOp, "column_sum", *column_sum, gram, "gram");
    check_dtype(kOp, "column_sum", *column_sum, gram, "gram");
    check_no_overlap(kOp, "column_sum", *column_sum, "x", x);
    check_no_overlap(kOp, "column_sum", *column_sum, "gram", gram);
    if (row_weight) check_no_overlap(kOp, "column_sum", *column_sum, "row_weight", *row_weight);
    params.column_sum = column_sum->mutable_data_ptr();
  }
  params.gram = gram.mutable_data_ptr();
  kernels().gram_accumulate(params);
}

void cross_gram_accumulate_(Tensor cross,       // [K, N]
                            const Tensor& x,    // [..., K]
                            const Tensor& z) {  // [..., N]
  constexpr char kCross[] = "cross_gram_accumulate_";
  GramParams params{};
  params.gram_dtype = checked_dtype(kCross, "cross", cross, true);
  params.dtype = checked_dtype(kCross, "x", x);
  if (cross.dim() != 2 || cross.size(0) < 1 || cross.size(1) < 1) {
    bad_shape(kCross, "cross", "[K, N], both positive", cross);
  }
  check_contiguous(kCross, "cross", cross);
  const int64_t K = cross.size(0), N = cross.size(1);
  if (x.dim() < 1 || x.size(x.dim() - 1) != K) {
    bad_shape(kCross, "x", "[..., K] with K = " + std::to_string(K) + " (the rows of cross)", x);
  }
  const auto sizes = x.sizes(), found = z.sizes();
  std::vector<int64_t> wanted(sizes.begin(), sizes.end());
  wanted.back() = N;
  if (wanted != std::vector<int64_t>(found.begin(), found.end())) {
    bad_shape(kCross, "z", shape_text(wanted) + " (the rows of x, and the columns of cross)", z);
  }
  check_dtype(kCross, "z", z, x, "x");
  check(cross.is_cpu(), kCross, ": cross must be on cpu as the other arguments are");
  check_device(kCross, "x", x, cross, "cross");
  check_device(kCross, "z", z, cross, "cross");
  check_no_overlap(kCross, "cross", cross, "x", x);
  check_no_overlap(kCross, "cross", cross, "z", z);
  const RowsView rows(x), targets(z);
  params.x = rows.view();
  params.z = targets.view();
  params.cross = true;
  params.batches = 1;
  params.gram = cross.mutable_data_ptr();
  kernels().gram_accumulate(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixrank_kernels, CPU, m) {
  m.impl("gram_accumulate_", TORCH_BOX(&gram_accumulate_));
  m.impl("cross_gram_accumulate_", TORCH_BOX(&cross_gram_accumulate_));
}

}  // namespace mixrank
