#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/checks.h"
#include "cpu/isa.h"

namespace mixrank {
namespace {

constexpr char kOp[] = "lowrank_linear";

Tensor lowrank_linear(const Tensor& x,                     // [..., K]
                      const Tensor& down,                  // [R, K]
                      const Tensor& up,                    // [N, R]
                      const std::optional<Tensor>& bias,     // [N]
                      const std::optional<Tensor>& packed) {  // [bytes], of no use to these kernels; returns [..., N]
  LowrankLinearParams params{};
  params.dtype = checked_dtype(kOp, "x", x);
  check(x.is_cpu(), kOp, ": x must be on cpu as the other arguments are");
  check_shape(kOp, "x", x.dim() >= 1, "[..., K]", x);
  const int64_t K = x.size(x.dim() - 1);
  check_shape(kOp, "down", down.dim() == 2 && down.size(1) == K,
              "[R, K] with K = " + std::to_string(K) + " (the last dimension of x)", down);
  const int64_t R = down.size(0);
  check(R >= 1, kOp, ": down must have at least one row (the rank R), but it had none");
  check(K >= 1, kOp, ": x must have at least one feature (its last dimension), but it had none");
  check_shape(kOp, "up", up.dim() == 2 && up.size(1) == R, "[N, R] with R = " + std::to_string(R) + " (the rows of down)",
              up);
  const int64_t N = up.size(0);
  check(N >= 1, kOp, ": up must have at least one row (out features N), but it had none");
  if (bias) {
    check_shape(kOp, "bias", bias->dim() == 1 && bias->size(0) == N,
                "[N] with N = " + std::to_string(N) + " (the rows of up)", *bias);
  }
  const auto check_like_x = [&](const char* argument, const Tensor& tensor) {
    check_device(kOp, argument, tensor, x, "x");
    check_dtype(kOp, argument, tensor, x, "x");
  };
  check_like_x("down", down);
  check_like_x("up", up);
  if (bias) {
    check_like_x("bias", *bias);
    params.bias = bias->const_data_ptr();
    params.bias_stride = bias->stride(0);
  }
  if (packed) {
    check(packed->scalar_type() == torch::headeronly::ScalarType::Byte, kOp,
          ": packed must have dtype uint8, but it was ", torch::headeronly::toString(packed->scalar_type()));
    check_shape(kOp, "packed", packed->dim() == 1, "[bytes]", *packed);
    check_contiguous(kOp, "packed", *packed);
    check_device(kOp, "packed", *packed, x, "x");
  }

  const RowsView rows(x);
  params.x = rows.view();
  params.down = matrix_view(down);
  params.up = matrix_view(up);
  checked_product(kOp, "the output", checked_product(kOp, "the output", params.x.rows, N), element_size(params.dtype));

  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = N;
  Tensor y = torch::stable::new_empty(x, shape);
  params.y = y.mutable_data_ptr();
  kernels().lowrank_linear(params);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixrank_kernels, CPU, m) { m.impl("lowrank_linear", TORCH_BOX(&lowrank_linear)); }

}  // namespace mixrank
