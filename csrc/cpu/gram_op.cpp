#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "cpu/isa.h"

namespace mixrank {
namespace {

constexpr char kOp[] = "gram_accumulate_";

float as_float(uint32_t bits) {
  float value;
  static_assert(sizeof(value) == sizeof(bits));
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f, fraction = bits & 0x3ff;
  double magnitude = exponent == 0 ? fraction * 0x1p-24 : (1024 + fraction) * __builtin_ldexp(1.0, exponent - 25);
  if (exponent == 0x1f) magnitude = fraction ? __builtin_nan("") : __builtin_inf();
  return bits & 0x8000 ? -magnitude : magnitude;
}

double element(const void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<const float*>(data)[index];
    case Dtype::kFloat64:
      return static_cast<const double*>(data)[index];
    case Dtype::kBFloat16:
      return as_float(static_cast<uint32_t>(static_cast<const BFloat*>(data)[index].bits) << 16);
    case Dtype::kFloat16:
      return half_value(static_cast<const Half*>(data)[index].bits);
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

void check_accumulator(const char* argument, const Tensor& tensor, const Tensor& x) {
  check(tensor.is_contiguous(), kOp, ": ", argument, " must be contiguous, but it was a strided view of shape ",
        shape_of(tensor));
  check_no_overlap(kOp, argument, tensor, "x", x);
}

void gram_accumulate_(Tensor gram,                               // [K, K] or [B, K, K]
                      const Tensor& x,                           // [..., K] or [B, M, K]
                      const std::optional<Tensor>& row_weight,   // x.shape[:-1]
                      const std::optional<Tensor>& column_sum) {  // [K] or [B, K]
  GramParams params{};
  params.dtype = checked_dtype(kOp, "x", x);
  params.gram_dtype = checked_dtype(kOp, "gram", gram);
  check(params.gram_dtype == Dtype::kFloat64 || params.gram_dtype == Dtype::kFloat32, kOp,
        ": gram must be float64 or float32, but it was ", dtype_name(gram));
  check(x.dim() >= 1, kOp, ": x must have shape [..., K], but it was ", shape_of(x));
  const int64_t K = x.size(x.dim() - 1);
  check(K >= 1, kOp, ": x must have shape [..., K] with K >= 1, but it was ", shape_of(x));
  check(gram.dim() == 2 || gram.dim() == 3, kOp, ": gram must have shape [K, K] or [B, K, K], but it was ",
        shape_of(gram));
  const bool batched = gram.dim() == 3;
  if (batched) {
    check(x.dim() == 3 && x.size(0) == gram.size(0), kOp, ": x must have shape [B, M, K] with B = ", gram.size(0),
          " (the first dimension of gram), but it was ", shape_of(x));
    check_shape(kOp, "gram", gram, {x.size(0), K, K}, "[B, K, K] with K the last dimension of x");
  } else {
    check_shape(kOp, "gram", gram, {K, K}, "[K, K] with K the last dimension of x");
  }
  check_accumulator("gram", gram, x);
  if (column_sum) {
    check_same_dtype(kOp, "column_sum", *column_sum, "gram", gram);
    check_shape(kOp, "column_sum", *column_sum, batched ? std::vector<int64_t>{x.size(0), K} : std::vector<int64_t>{K},
                batched ? "[B, K]" : "[K]");
    check_accumulator("column_sum", *column_sum, x);
    check_no_overlap(kOp, "column_sum", *column_sum, "gram", gram);
    params.column_sum = column_sum->mutable_data_ptr();
  }

  RowsView rows(x);
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
    const auto sizes = x.sizes();
    check_shape(kOp, "row_weight", *row_weight, std::vector<int64_t>(sizes.begin(), sizes.end() - 1),
                "the shape of x without its last dimension");
    check_no_overlap(kOp, "gram", gram, "row_weight", *row_weight);
    if (column_sum) check_no_overlap(kOp, "column_sum", *column_sum, "row_weight", *row_weight);
    const int64_t count = params.x.rows * params.batches;
    if (params.dtype == Dtype::kFloat64) {
      double_weights = gathered_weights<double>(*row_weight, weight_dtype, count);
      params.row_weight = double_weights.data();
    } else {
      float_weights = gathered_weights<float>(*row_weight, weight_dtype, count);
      params.row_weight = float_weights.data();
    }
  }
  params.gram = gram.mutable_data_ptr();
  kernels().gram_accumulate(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixrank_kernels, CPU, m) { m.impl("gram_accumulate_", TORCH_BOX(&gram_accumulate_)); }

}  // namespace mixrank
