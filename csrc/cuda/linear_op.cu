// _cuda_linear: the linear operators on CUDA tensors that mixrank_kernels.cuda has brought into form.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "cuda/launch_product.h"
#include "cuda/launcher.cuh"

namespace mixrank {
namespace {

constexpr char kOp[] = "_cuda_linear";
using Optional = std::optional<Tensor>;

int size_of(const char* argument, int64_t size) {
  check(size < std::numeric_limits<int>::max(), kOp, ": ", argument, " must have less than 2^31 columns, but it had ", size);
  return static_cast<int>(size);
}

// Rows of adjacent elements, as the kernels read them.
void check_rows(const char* argument, const Tensor& tensor, int64_t cols, const Tensor& x) {
  if (!(tensor.dim() == 2 && tensor.size(1) == cols)) bad_shape(kOp, argument, "[rows, " + std::to_string(cols) + "]", tensor);
  check(cols <= 1 || tensor.stride(1) == 1, kOp, ": ", argument, " must have adjacent elements in its rows");
  check_device(kOp, argument, tensor, x, "x");
  check_dtype(kOp, argument, tensor, x, "x");
}

bool on_boundary(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

Tensor cuda_linear(const Tensor& x,                // [M, K]
                   const Tensor& down,             // [R, K]
                   const Tensor& up,               // [N, R]
                   const Optional& bias,           // [N]
                   const Optional& residual_down,  // [Q, K]
                   const Optional& residual_up,    // [N, Q]
                   const Optional& crow,           // [N / b + 1]
                   const Optional& col,            // [nnz]
                   const Optional& values,         // [nnz, b, b]
                   int64_t terms,                  // of bf16 in an fp32 value, 2 or 3
                   int64_t launches,               // 1 or 2 where there is a choice, 0 by size
                   int64_t tile) {                 // ProductTile; returns [M, N]
  const Dtype dtype = checked_dtype(kOp, "x", x);
  check(dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat32, kOp, ": x must be bfloat16 or float32, but it was ",
        dtype_name(x));
  check(terms == 2 || terms == 3, kOp, ": terms must be 2 or 3, but it was ", terms);
  check(x.dim() == 2 && x.size(0) > 0, kOp, ": x must have shape [M, K] with at least one row");
  LinearArguments call{};
  call.operand = dtype == Dtype::kBFloat16 ? LinearOperand::kBFloat16
                 : terms == 2              ? LinearOperand::kFloat32Two
                                           : LinearOperand::kFloat32Three;
  call.M = x.size(0);
  call.K = size_of("x", x.size(1));
  call.N = size_of("up", up.size(0));
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  check_rows("x", x, call.K, x);
  const std::pair<const Tensor*, const Tensor*> pairs[2] = {
      {&down, &up}, {residual_down ? &*residual_down : nullptr, residual_up ? &*residual_up : nullptr}};
  for (int i = 0; i < 2; ++i) {
    const auto& [first, second] = pairs[i];
    if (first == nullptr) continue;
    check(second != nullptr, kOp, ": residual_up must be given with residual_down");
    check_rows(i == 0 ? "down" : "residual_down", *first, call.K, x);
    check_rows(i == 0 ? "up" : "residual_up", *second, first->size(0), x);
    check(second->size(0) == call.N, kOp, ": residual_up must have the rows of up");
    call.factors[i] = {size_of("up", first->size(0)), first->const_data_ptr(), second->const_data_ptr(),
                       first->stride(0), second->stride(0)};
  }
  if (bias) {
    if (!(bias->dim() == 1 && bias->size(0) == call.N)) bad_shape(kOp, "bias", "[N]", *bias);
    check_contiguous(kOp, "bias", *bias);
    check_dtype(kOp, "bias", *bias, x, "x");
    check_device(kOp, "bias", *bias, x, "x");
    call.bias = bias->const_data_ptr();
  }
  if (values) {
    check(crow && col, kOp, ": crow and col must be given with values");
    for (const Tensor* part : {&*crow, &*col, &*values}) {
      check_contiguous(kOp, "the block-sparse residual", *part);
      check_device(kOp, "the block-sparse residual", *part, x, "x");
    }
    check_dtype(kOp, "values", *values, x, "x");
    check(values->dim() == 3 && values->size(1) == values->size(2) && values->size(2) % 16 == 0, kOp,
          ": values must have blocks of a multiple of 16, but it had shape ", shape_of(*values));
    const int64_t size = element_size(dtype);
    SparseTerm& sparse = call.sparse;
    sparse.x = call.x;
    sparse.x_stride = call.x_stride;
    sparse.values = values->const_data_ptr();
    sparse.crow = crow->const_data_ptr();
    sparse.col = col->const_data_ptr();
    sparse.wide_indices = crow->scalar_type() == torch::headeronly::ScalarType::Long;
    sparse.aligned = on_boundary(sparse.x, 4 * size) && call.x_stride % 4 == 0 && on_boundary(sparse.values, 4 * size);
    sparse.size = size_of("values", values->size(2));
  }
  check(launches >= 0 && launches <= 2, kOp, ": launches must be 0, 1 or 2, but it was ", launches);
  check(tile >= 0 && tile <= 4, kOp, ": tile must be at least 0 and at most 4, but it was ", tile);
  Tensor y = new_tensor(x, {call.M, call.N});
  call.y = y.mutable_data_ptr();
  Launcher launcher(x);
  LinearForm form = form_by_size(call, launcher.architecture());
  if (launches != 0) form.launches = static_cast<int>(launches);
  if (cluster_of(call, launcher.architecture()) == 0) form.launches = 2;
  form.tile = static_cast<ProductTile>(tile);
  std::optional<Tensor> hidden;
  if (form.launches == 2) {
    hidden = new_tensor(x, {call.M, hidden_stride(call.factors[0].rank, call.factors[1].rank)});
    call.hidden = hidden->mutable_data_ptr();
  }
  linear(launcher, call, form);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mixrank_kernels, m) {
  m.def(
      "_cuda_linear(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? residual_down, Tensor? residual_up, "
      "Tensor? crow, Tensor? col, Tensor? values, int terms, int launches=0, int tile=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixrank_kernels, CUDA, m) { m.impl("_cuda_linear", TORCH_BOX(&cuda_linear)); }

}  // namespace mixrank
