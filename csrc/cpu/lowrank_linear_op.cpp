// lowrank_linear, lowrank_residual_linear and pivoted_linear for the dispatch key CPU, and _pack_factors, which only
// mixrank_kernels.packing calls: what it returns is the `packed` of the others.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>

#include "common/checks.h"
#include "cpu/isa.h"
#include "cpu/weight_sample.h"

namespace mixrank {
namespace {

using Optional = std::optional<Tensor>;

// Arguments of one call, checked in the order of the schema and turned into LowrankLinearParams.
class Call {
 public:
  Call(const char* op, const Tensor& x) : Call(op, x, "x") {
    check(x.is_cpu(), op, ": x must be on cpu as the other arguments are");
    if (!(x.dim() >= 1)) bad_shape(op, "x", "[..., K]", x);
  }

  // Other arguments are compared with `like`, whose last dimension is K.
  Call(const char* op, const Tensor& like, const char* like_name)
      : op_(op), like_(like), like_name_(like_name), K_(like.dim() > 0 ? like.size(like.dim() - 1) : 0) {
    params_.dtype = checked_dtype(op, like_name, like);
    params_.x.cols = K_;
  }

  void factors(const Tensor& down, const Tensor& up) {
    take_down(down);
    if (!(up.dim() == 2 && up.size(1) == R_))
      bad_shape(op_, "up", "[N, R] with R = " + text(R_) + " (the rows of down)", up);
    N_ = up.size(0);
    check(N_ >= 1, op_, ": up must have at least one row (out features N), but it had none");
    check_like("down", down);
    check_like("up", up);
    params_.down[0] = matrix_view(down);
    params_.up[0] = matrix_view(up);
  }

  // Entries of index are read when they are needed, and checked then.
  void pivots(const Tensor& down, const Tensor& coefficients, const Tensor& index) {
    take_down(down);
    if (!(coefficients.dim() == 2 && coefficients.size(1) == R_))
      bad_shape(op_, "coefficients", "[N - R, R] with R = " + text(R_) + " (the rows of down)", coefficients);
    N_ = R_ + coefficients.size(0);
    if (!(index.dim() == 1 && index.size(0) == N_))
      bad_shape(op_, "index", "[N] with N = " + text(N_) + " (the rows of down and of coefficients)", index);
    check_index_dtype(op_, "index", index, true);
    check_contiguous(op_, "index", index);
    check_device(op_, "index", index, like_, like_name_);
    check_like("down", down);
    check_like("coefficients", coefficients);
    params_.pivoted = true;
    params_.down[0] = matrix_view(down);
    params_.up[0] = matrix_view(coefficients);
    index_ = &index;
  }

  void read_pivots() {
    static thread_local std::vector<int64_t> widened;
    params_.index = indices(*index_, widened);
    int64_t pivot = 0, other = R_;
    for (int64_t n = 0; n < N_; ++n) {
      int64_t* const next[] = {&pivot, &other};
      const bool is_pivot = pivot < R_ && params_.index[pivot] == n;
      check(is_pivot || (other < N_ && params_.index[other] == n), op_, ": index must hold 0 to ", N_ - 1,
            " once each, rising in its first ", R_, " entries (the rows of down) and in the others, but ", n,
            " was missing or out of order");
      ++*next[!is_pivot];
    }
  }

  void bias(const Optional& bias, const char* what = "(the rows of up)") {
    if (!bias) return;
    if (!(bias->dim() == 1 && bias->size(0) == N_))
      bad_shape(op_, "bias", "[N] with N = " + text(N_) + " " + what, *bias);
    check_like("bias", *bias);
    params_.bias = bias->const_data_ptr();
    params_.bias_stride = bias->stride(0);
  }

  void branch(const Optional& down, const Optional& up) {
    together({{"residual_down", &down}, {"residual_up", &up}});
    if (!down) return;
    if (!(down->dim() == 2 && down->size(1) == K_))
      bad_shape(op_, "residual_down", "[Q, K] with K = " + text(K_) + " (the last dimension of x)", *down);
    const int64_t Q = down->size(0);
    check(Q >= 1, op_, ": residual_down must have at least one row (the rank Q), but it had none");
    if (!(up->dim() == 2 && up->size(0) == N_ && up->size(1) == Q))
      bad_shape(op_, "residual_up",
                "[N, Q] with N = " + text(N_) + " (the rows of up) and Q = " + text(Q) + " (the rows of residual_down)",
                *up);
    check_like("residual_down", *down);
    check_like("residual_up", *up);
    params_.down[1] = matrix_view(*down);
    params_.up[1] = matrix_view(*up);
  }

  void blocks(const Tensor& up, const Optional& crow, const Optional& col, const Optional& values) {
    together({{"crow", &crow}, {"col", &col}, {"values", &values}});
    if (!values) return;
    const int64_t b = values->dim() == 3 ? values->size(2) : 0;
    if (!((b == 16 || b == 32) && values->size(1) == b))
      bad_shape(op_, "values", "[nnz, b, b] with b one of 16, 32", *values);
    const auto multiple = [b](const char* shape) { return shape + text(b) + " (the size of a block of values)"; };
    if (K_ % b != 0) bad_shape(op_, like_name_, multiple("[..., K] with K a multiple of "), like_);
    if (N_ % b != 0) bad_shape(op_, "up", multiple("[N, R] with N a multiple of "), up);
    const int64_t nnz = values->size(0);
    if (!(crow->dim() == 1 && crow->size(0) == N_ / b + 1))
      bad_shape(op_, "crow", "[N / b + 1] with N = " + text(N_) + " and b = " + text(b), *crow);
    if (!(col->dim() == 1 && col->size(0) == nnz))
      bad_shape(op_, "col", "[nnz] with nnz = " + text(nnz) + " (the blocks of values)", *col);
    check_index_dtype(op_, "crow", *crow);
    check_dtype(op_, "col", *col, *crow, "crow");
    check_dtype(op_, "values", *values, like_, like_name_);
    for (const auto& [name, tensor] : {std::pair{"crow", &crow}, {"col", &col}, {"values", &values}}) {
      check_contiguous(op_, name, **tensor);
      check_device(op_, name, **tensor, like_, like_name_);
    }
    static thread_local std::vector<int64_t> wide_crow, wide_col;
    params_.blocks = {b, nnz, indices(*crow, wide_crow), indices(*col, wide_col), values->const_data_ptr()};
    check_indices();
  }

  void packed(const Optional& packed) {
    if (!packed) return;
    check(packed->scalar_type() == torch::headeronly::ScalarType::Byte, op_,
          ": packed must have dtype uint8, but it was ", dtype_name(*packed));
    if (!(packed->dim() == 1)) bad_shape(op_, "packed", "[bytes]", *packed);
    check_contiguous(op_, "packed", *packed);
    check_device(op_, "packed", *packed, like_, like_name_);
    // Packed for another instruction set or at an odd address, it is of no use, and the factors themselves serve.
    const void* data = packed->const_data_ptr();
    PackedHeader header;
    const bool has_header = packed->size(0) >= static_cast<int64_t>(sizeof(header));
    if (has_header) memcpy(&header, data, sizeof(header));
    check(has_header && memcmp(header.magic, kPackedMagic, sizeof(header.magic)) == 0, op_,
          ": packed must come from mixrank_kernels.packing, but it has another content");
    const BlockSparse& blocks = params_.blocks;
    check(header.dtype == params_.dtype && header.K == K_ && header.N == N_ && header.R == R_ &&
              header.Q == params_.down[1].rows && header.block_size == blocks.size &&
              header.block_count == blocks.count && header.pivoted == params_.pivoted,
          op_, ": packed must be made from these factors, but it was made for K = ", header.K, ", N = ", header.N,
          ", R = ", header.R, ", Q = ", header.Q, " and ", header.block_count, " blocks, ",
          header.pivoted ? "with" : "without", " an index, or another dtype");
    if (header.isa != kernels().isa_id || reinterpret_cast<uintptr_t>(data) % 64 != 0) return;
    check(packed->size(0) == kernels().lowrank_pack(params_, nullptr), op_, ": packed must be whole, but it was cut");
    if (header.sample != sample()) return;  // the factors have changed since: they count
    params_.packed = data;
  }

  Tensor run(const Tensor& x) {
    const RowsView rows(x);
    params_.x = rows.view();
    const int64_t elements = checked_product(op_, "the output", params_.x.rows, N_);
    checked_product(op_, "the output", elements, element_size(params_.dtype));
    const auto sizes = x.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    shape.back() = N_;
    Tensor y = new_tensor(x, shape);
    params_.y = y.mutable_data_ptr();
    if (params_.pivoted && !params_.packed) read_pivots();
    kernels().lowrank_linear(params_);
    return y;
  }

  Tensor pack() {
    params_.sample = sample();
    if (params_.pivoted) read_pivots();
    Tensor packed = torch::stable::new_empty(like_, {kernels().lowrank_pack(params_, nullptr)},
                                             torch::headeronly::ScalarType::Byte);
    kernels().lowrank_pack(params_, packed.mutable_data_ptr());
    return packed;
  }

 private:
  static std::string text(int64_t value) { return std::to_string(value); }

  void take_down(const Tensor& down) {
    if (!(down.dim() == 2 && down.size(1) == K_))
      bad_shape(op_, "down", "[R, K] with K = " + text(K_) + " (the last dimension of x)", down);
    R_ = down.size(0);
    check(R_ >= 1, op_, ": down must have at least one row (the rank R), but it had none");
    check(K_ >= 1, op_, ": x must have at least one feature (its last dimension), but it had none");
  }

  void check_like(const char* argument, const Tensor& tensor) const {
    check_device(op_, argument, tensor, like_, like_name_);
    check_dtype(op_, argument, tensor, like_, like_name_);
  }

  void together(std::initializer_list<std::pair<const char*, const Optional*>> parts) const {
    size_t count = 0;
    for (const auto& part : parts) count += part.second->has_value();
    if (count == 0 || count == parts.size()) return;
    std::string names, absent;
    for (const auto& [name, tensor] : parts) {
      names += (names.empty() ? "" : ", ") + std::string(name);
      if (!tensor->has_value()) absent += (absent.empty() ? "" : ", ") + std::string(name);
    }
    check(false, op_, ": ", names, " must be given together or not at all, but ", absent, " was missing");
  }

  uint64_t sample() const {
    WeightSample sample;
    const int64_t size = element_size(params_.dtype);
    for (const MatrixView* view : {&params_.down[0], &params_.up[0], &params_.down[1], &params_.up[1]}) {
      sample.add(view->data, size, view->rows, view->cols, view->row_stride, view->col_stride);
    }
    const BlockSparse& blocks = params_.blocks;
    sample.add(blocks.values, size, blocks.count * blocks.size, blocks.size, blocks.size, 1);
    if (index_) sample.add(index_->const_data_ptr(), index_->element_size(), N_, 1, 1, 1);
    return sample.hash();
  }

  // The indices as int64; narrower ones are widened into `widened`.
  static const int64_t* indices(const Tensor& tensor, std::vector<int64_t>& widened) {
    const void* data = tensor.const_data_ptr();
    const auto widen = [&](const auto* narrow) {
      widened.assign(narrow, narrow + tensor.size(0));
      return static_cast<const int64_t*>(widened.data());
    };
    switch (tensor.scalar_type()) {
      case torch::headeronly::ScalarType::Long:
        return static_cast<const int64_t*>(data);
      case torch::headeronly::ScalarType::Int:
        return widen(static_cast<const int32_t*>(data));
      default:
        return widen(static_cast<const int16_t*>(data));
    }
  }

  void check_indices() const {
    const BlockSparse& blocks = params_.blocks;
    const int64_t rows = N_ / blocks.size, columns = K_ / blocks.size, last = blocks.crow[rows];
    check(blocks.crow[0] == 0, op_, ": crow must begin with 0, but it began with ", blocks.crow[0]);
    check(last == blocks.count, op_, ": crow must end with ", blocks.count,
          " (the blocks of values), but it ended with ", last);
    for (int64_t i = 0; i < rows; ++i) {
      check(blocks.crow[i] <= blocks.crow[i + 1], op_, ": crow must never fall, but it fell after entry ", i);
    }
    for (int64_t e = 0; e < blocks.count; ++e) {
      check(blocks.col[e] >= 0 && blocks.col[e] < columns, op_, ": col must be at least 0 and less than ", columns,
            " (K / b), but it was ", blocks.col[e]);
    }
  }

  const char* op_;
  const Tensor& like_;
  const char* like_name_;
  int64_t K_, N_ = 0, R_ = 0;
  const Tensor* index_ = nullptr;
  LowrankLinearParams params_{};
};

Tensor lowrank_linear(const Tensor& x,           // [..., K]
                      const Tensor& down,        // [R, K]
                      const Tensor& up,          // [N, R]
                      const Optional& bias,      // [N]
                      const Optional& packed) {  // [bytes]; returns [..., N]
  Call call("lowrank_linear", x);
  call.factors(down, up);
  call.bias(bias);
  call.packed(packed);
  return call.run(x);
}

Tensor lowrank_residual_linear(const Tensor& x,                // [..., K]
                               const Tensor& down,             // [R, K]
                               const Tensor& up,               // [N, R]
                               const Optional& bias,           // [N]
                               const Optional& residual_down,  // [Q, K]
                               const Optional& residual_up,    // [N, Q]
                               const Optional& crow,           // [N / b + 1]
                               const Optional& col,            // [nnz]
                               const Optional& values,         // [nnz, b, b]
                               const Optional& packed) {       // [bytes]; returns [..., N]
  Call call("lowrank_residual_linear", x);
  call.factors(down, up);
  call.bias(bias);
  call.branch(residual_down, residual_up);
  call.blocks(up, crow, col, values);
  call.packed(packed);
  return call.run(x);
}

Tensor pivoted_linear(const Tensor& x,             // [..., K]
                      const Tensor& down,          // [R, K]
                      const Tensor& coefficients,  // [N - R, R]
                      const Tensor& index,         // [N]
                      const Optional& bias,        // [N]
                      const Optional& packed) {    // [bytes]; returns [..., N]
  Call call("pivoted_linear", x);
  call.pivots(down, coefficients, index);
  call.bias(bias, "(the entries of index)");
  call.packed(packed);
  return call.run(x);
}

Tensor pack_pivots(const Tensor& down, const Tensor& coefficients, const Tensor& index) {
  constexpr char kOp[] = "_pack_pivots";
  if (!(down.dim() == 2)) bad_shape(kOp, "down", "[R, K]", down);
  Call call(kOp, down, "down");
  call.pivots(down, coefficients, index);
  return call.pack();
}

Tensor pack_factors(const Tensor& down, const Tensor& up, const Optional& residual_down, const Optional& residual_up,
                    const Optional& crow, const Optional& col, const Optional& values) {
  constexpr char kOp[] = "_pack_factors";
  if (!(down.dim() == 2)) bad_shape(kOp, "down", "[R, K]", down);
  Call call(kOp, down, "down");
  call.factors(down, up);
  call.branch(residual_down, residual_up);
  call.blocks(up, crow, col, values);
  return call.pack();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mixrank_kernels, m) {
  m.def(
      "_pack_factors(Tensor down, Tensor up, Tensor? residual_down=None, Tensor? residual_up=None, Tensor? crow=None, "
      "Tensor? col=None, Tensor? values=None) -> Tensor");
  m.def("_pack_pivots(Tensor down, Tensor coefficients, Tensor index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixrank_kernels, CPU, m) {
  m.impl("lowrank_linear", TORCH_BOX(&lowrank_linear));
  m.impl("lowrank_residual_linear", TORCH_BOX(&lowrank_residual_linear));
  m.impl("pivoted_linear", TORCH_BOX(&pivoted_linear));
  m.impl("_pack_factors", TORCH_BOX(&pack_factors));
  m.impl("_pack_pivots", TORCH_BOX(&pack_pivots));
}

}  // namespace mixrank
