// sparse_linear for the dispatch key CPU, and _pack_sparse, which only mixrank_kernels.packing calls: what it returns
// is the `packed` of the other.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>

#include "common/checks.h"
#include "cpu/isa.h"
#include "cpu/weight_sample.h"

namespace mixrank {
namespace {

using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

// Arguments of one call, checked in the order of the schema and turned into SparseLinearParams.
class SparseCall {
 public:
  SparseCall(const char* op, const Tensor& x) : SparseCall(op, x, "x") {
    check(x.is_cpu(), op, ": x must be on cpu as the other arguments are");
    if (!(x.dim() >= 1)) bad_shape(op, "x", "[..., K]", x);
    K_ = x.size(x.dim() - 1);
    check(K_ >= 1, op, ": x must have at least one feature (its last dimension), but it had none");
    params_.x.cols = K_;
  }

  // For _pack_sparse, where nothing is multiplied. Without down, K may be any that needs as many bytes of the mask.
  SparseCall(const char* op, const Tensor& values, const Tensor& mask, const Optional& down)
      : SparseCall(op, values, "values") {
    if (!(mask.dim() == 2 && mask.size(1) >= 1)) bad_shape(op, "mask", "[N, ceil(K / 8)]", mask);
    if (down && down->dim() != 2) bad_shape(op, "down", "[R, K]", *down);
    K_ = down ? down->size(1) : 8 * mask.size(1);
    params_.x.cols = K_;
  }

  void sparse(const Tensor& mask, const Tensor& values) {
    const int64_t bytes = (K_ + 7) / 8;
    if (!(mask.dim() == 2 && mask.size(1) == bytes))
      bad_shape(op_, "mask", "[N, ceil(K / 8)] with K = " + text(K_) + " (the last dimension of x)", mask);
    N_ = mask.size(0);
    check(N_ >= 1, op_, ": mask must have at least one row (out features N), but it had none");
    check(mask.scalar_type() == ScalarType::Byte, op_, ": mask must have dtype uint8, but it was ", dtype_name(mask));
    check_contiguous(op_, "mask", mask);
    check_device(op_, "mask", mask, like_, like_name_);
    if (!(values.dim() == 1)) bad_shape(op_, "values", "[nnz]", values);
    check_like("values", values);
    check_contiguous(op_, "values", values);
    params_.N = N_;
    params_.count = values.size(0);
    params_.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    params_.values = values.const_data_ptr();
  }

  void branch(const Optional& down, const Optional& up) {
    check(down.has_value() == up.has_value(), op_, ": down, up must be given together or not at all, but ",
          down ? "up" : "down", " was missing");
    if (!down) return;
    if (!(down->dim() == 2 && down->size(1) == K_))
      bad_shape(op_, "down", "[R, K] with K = " + text(K_) + " (the last dimension of x)", *down);
    const int64_t R = down->size(0);
    check(R >= 1, op_, ": down must have at least one row (the rank R), but it had none");
    if (!(up->dim() == 2 && up->size(0) == N_ && up->size(1) == R))
      bad_shape(op_, "up",
                "[N, R] with N = " + text(N_) + " (the rows of mask) and R = " + text(R) + " (the rows of down)", *up);
    check_like("down", *down);
    check_like("up", *up);
    params_.down = matrix_view(*down);
    params_.up = matrix_view(*up);
  }

  void bias(const Optional& bias) {
    if (!bias) return;
    if (!(bias->dim() == 1 && bias->size(0) == N_))
      bad_shape(op_, "bias", "[N] with N = " + text(N_) + " (the rows of mask)", *bias);
    check_like("bias", *bias);
    params_.bias = bias->const_data_ptr();
    params_.bias_stride = bias->stride(0);
  }

  void packed(const Optional& packed) {
    if (!packed) return;
    check(packed->scalar_type() == ScalarType::Byte, op_, ": packed must have dtype uint8, but it was ",
          dtype_name(*packed));
    if (!(packed->dim() == 1)) bad_shape(op_, "packed", "[bytes]", *packed);
    check_contiguous(op_, "packed", *packed);
    check_device(op_, "packed", *packed, like_, like_name_);
    const void* data = packed->const_data_ptr();
    PackedSparseHeader header;
    const bool has_header = packed->size(0) >= static_cast<int64_t>(sizeof(header));
    if (has_header) memcpy(&header, data, sizeof(header));
    check(has_header && memcmp(header.magic, kPackedSparseMagic, sizeof(header.magic)) == 0, op_,
          ": packed must come from mixrank_kernels.packing, but it has another content");
    check(header.dtype == params_.dtype && header.mask_row == (K_ + 7) / 8 && header.N == N_ &&
              header.R == params_.down.rows && header.count == params_.count,
          op_, ": packed must be made from these weights, but it was made for a mask of [", header.N, ", ",
          header.mask_row, "], R = ", header.R, " and ", header.count, " values, or another dtype");
    // Packed for another instruction set or at an odd address, it is of no use, and the weights themselves serve.
    if (header.isa != kernels().isa_id || reinterpret_cast<uintptr_t>(data) % 64 != 0) return;
    check(packed->size(0) == kernels().sparse_pack(params_, nullptr), op_, ": packed must be whole, but it was cut");
    if (header.sample != sample()) return;  // the weights have changed since: they count
    params_.packed = data;
  }

  Tensor run(const Tensor& x) {
    check_mask();
    const RowsView rows(x);
    params_.x = rows.view();
    const int64_t elements = checked_product(op_, "the output", params_.x.rows, N_);
    checked_product(op_, "the output", elements, element_size(params_.dtype));
    const auto sizes = x.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    shape.back() = N_;
    Tensor y = new_tensor(x, shape);
    params_.y = y.mutable_data_ptr();
    kernels().sparse_linear(params_);
    return y;
  }

  Tensor pack() {
    check_mask();
    params_.sample = sample();
    Tensor packed = torch::stable::new_empty(like_, {kernels().sparse_pack(params_, nullptr)}, ScalarType::Byte);
    kernels().sparse_pack(params_, packed.mutable_data_ptr());
    return packed;
  }

 private:
  // Other arguments are compared with `like`.
  SparseCall(const char* op, const Tensor& like, const char* like_name) : op_(op), like_(like), like_name_(like_name) {
    params_.dtype = checked_dtype(op, like_name, like);
  }

  static std::string text(int64_t value) { return std::to_string(value); }

  void check_like(const char* argument, const Tensor& tensor) const {
    check_device(op_, argument, tensor, like_, like_name_);
    check_dtype(op_, argument, tensor, like_, like_name_);
  }

  // What the kernel relies on: a feature for each bit, and a value, which was counted when the weights were packed.
  void check_mask() const {
    const int64_t bytes = (K_ + 7) / 8;
    for (int64_t n = 0; K_ % 8 != 0 && n < N_; ++n) {
      check(params_.mask[(n + 1) * bytes - 1] >> K_ % 8 == 0, op_, ": mask must have no bit set beyond K = ", K_,
            ", but row ", n, " had one");
    }
    if (params_.packed) return;
    const int64_t size = N_ * bytes;
    int64_t count = 0, i = 0;
    for (; i + 8 <= size; i += 8) {
      uint64_t word;
      memcpy(&word, params_.mask + i, sizeof(word));
      count += __builtin_popcountll(word);
    }
    for (; i < size; ++i) count += __builtin_popcount(params_.mask[i]);
    check(params_.count == count, op_, ": values must have shape [nnz] with nnz = ", count,
          " (the bits of mask), but it was [", params_.count, "]");
  }

  uint64_t sample() const {
    WeightSample sample;
    const int64_t size = element_size(params_.dtype);
    sample.add(params_.mask, 1, N_, (K_ + 7) / 8, (K_ + 7) / 8, 1);
    sample.add(params_.values, size, params_.count, 1, 1, 1);
    for (const MatrixView* view : {&params_.down, &params_.up}) {
      sample.add(view->data, size, view->rows, view->cols, view->row_stride, view->col_stride);
    }
    return sample.hash();
  }

  const char* op_;
  const Tensor& like_;
  const char* like_name_;
  int64_t K_ = 0, N_ = 0;
  SparseLinearParams params_{};
};

Tensor sparse_linear(const Tensor& x,           // [..., K]
                     const Tensor& mask,        // [N, ceil(K / 8)]
                     const Tensor& values,      // [nnz]
                     const Optional& down,      // [R, K]
                     const Optional& up,        // [N, R]
                     const Optional& bias,      // [N]
                     const Optional& packed) {  // [bytes]; returns [..., N]
  SparseCall call("sparse_linear", x);
  call.sparse(mask, values);
  call.branch(down, up);
  call.bias(bias);
  call.packed(packed);
  return call.run(x);
}

Tensor pack_sparse(const Tensor& mask, const Tensor& values, const Optional& down, const Optional& up) {
  SparseCall call("_pack_sparse", values, mask, down);
  call.sparse(mask, values);
  call.branch(down, up);
  return call.pack();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mixrank_kernels, m) {
  m.def("_pack_sparse(Tensor mask, Tensor values, Tensor? down=None, Tensor? up=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixrank_kernels, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("_pack_sparse", TORCH_BOX(&pack_sparse));
}

}  // namespace mixrank
