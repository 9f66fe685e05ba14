#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "cpu/isa.h"

namespace mixrank {
namespace {

constexpr char kOp[] = "lowrank_linear";

Tensor lowrank_linear(const Tensor& x,                     // [..., K]
                      const Tensor& down,                  // [R, K]
                      const Tensor& up,                    // [N, R]
                      const std::optional<Tensor>& bias) {  // [N]; returns [..., N]
  LowrankLinearParams params{};
  params.dtype = checked_dtype(kOp, "x", x);
  check(x.dim() >= 1, kOp, ": x must have shape [..., K], but it was ", shape_of(x));
  const int64_t K = x.size(x.dim() - 1);
  check(K >= 1, kOp, ": x must have shape [..., K] with K >= 1, but it was ", shape_of(x));
  check_same_dtype(kOp, "down", down, "x", x);
  check(down.dim() == 2 && down.size(1) == K, kOp, ": down must have shape [R, K] with K = ", K,
        " (the last dimension of x), but it was ", shape_of(down));
  const int64_t R = down.size(0);
  check(R >= 1, kOp, ": down must have shape [R, K] with R >= 1, but it was ", shape_of(down));
  check_same_dtype(kOp, "up", up, "x", x);
  check(up.dim() == 2 && up.size(1) == R, kOp, ": up must have shape [N, R] with R = ", R,
        " (the first dimension of down), but it was ", shape_of(up));
  const int64_t N = up.size(0);
  check(N >= 1, kOp, ": up must have shape [N, R] with N >= 1, but it was ", shape_of(up));
  if (bias) {
    check_same_dtype(kOp, "bias", *bias, "x", x);
    check(bias->dim() == 1 && bias->size(0) == N, kOp, ": bias must have shape [N] with N = ", N,
          " (the first dimension of up), but it was ", shape_of(*bias));
    params.bias = bias->const_data_ptr();
    params.bias_stride = bias->stride(0);
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
