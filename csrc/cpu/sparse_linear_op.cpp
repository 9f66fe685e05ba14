// sparse_linear and int8_sparse_linear for the dispatch key CPU, and _pack_sparse and _pack_int8_sparse, which only
// mixrank_kernels.packing calls: what they return is the `packed` of the others.
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
  SparseCall(const char* op, const Tensor& x, bool is_codes = false) : op_(op), like_(x), like_name_("x") {
    params_.dtype = checked_dtype(op, "x", x);
    check(!is_codes || params_.dtype != Dtype::kFloat64, op,
          ": x must have one of the dtypes float32, bfloat16, float16, but it was float64");
    check(x.is_cpu(), op, ": x must be on cpu as the other arguments are");
    if (!(x.dim() >= 1)) bad_shape(op, "x", "[..., K]", x);
    K_ = x.size(x.dim() - 1);
    check(K_ >= 1, op, ": x must have at least one feature (its last dimension), but it had none");
    params_.x.cols = K_;
  }

  // For packing, where nothing is multiplied. Without down, K may be any that needs as many bytes of the mask.
  SparseCall(const char* op, const Tensor& values, const Tensor& mask, const Optional& down, bool is_codes)
      : op_(op), like_(values), like_name_("values") {
    params_.dtype = is_codes ? Dtype::kFloat32 : checked_dtype(op, "values", values);
    if (!(mask.dim() == 2 && mask.size(1) >= 1)) bad_shape(op, "mask", "[N, ceil(K / 8)]", mask);
    if (down && down->dim() != 2) bad_shape(op, "down", "[R, K]", *down);
    K_ = down ? down->size(1) : 8 * mask.size(1);
    params_.x.cols = K_;
  }

  void sparse(const Tensor& mask, const Tensor& values, const Tensor* scale = nullptr) {
    const int64_t bytes = (K_ + 7) / 8;
    if (!(mask.dim() == 2 && mask.size(1) == bytes))
      bad_shape(op_, "mask", "[N, ceil(K / 8)] with K = " + text(K_) + " (the last dimension of x)", mask);
    N_ = mask.size(0);
    check(N_ >= 1, op_, ": mask must have at least one row (out features N), but it had none");
    typed("mask", mask, ScalarType::Byte, "uint8");
    if (!(values.dim() == 1)) bad_shape(op_, "values", "[nnz]", values);
    if (scale) {
      typed("values", values, ScalarType::Char, "int8");
      params_.scale = scales("scale", *scale, "N", N_, "mask");
    } else {
      check_like("values", values);
      check_contiguous(op_, "values", values);
    }
    params_.N = N_;
    params_.count = values.size(0);
    params_.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    params_.values = values.const_data_ptr();
  }

  void branch(const Optional& down, const Optional& up) {
    check(down.has_value() == up.has_value(), op_, ": down, up must be given together or not at all, but ",
          down ? "up" : "down", " was missing");
    if (!down) return;
    factors(*down, *up);
    check_like("down", *down);
    check_like("up", *up);
  }

  void branch(const Optional& down, const Optional& down_scale, const Optional& up, const Optional& up_scale) {
    const std::pair<const char*, const Optional*> parts[] = {
        {"down", &down}, {"down_scale", &down_scale}, {"up", &up}, {"up_scale", &up_scale}};
    std::string missing;
    int64_t absent = 0;
    for (const auto& [name, part] : parts) {
      if (*part) continue;
      missing += (absent++ ? ", " : "") + std::string(name);
    }
    if (absent == 4) return;
    check(missing.empty(), op_, ": down, down_scale, up, up_scale must be given together or not at all, but ", missing,
          " was missing");
    factors(*down, *up);
    typed("down", *down, ScalarType::Char, "int8");
    params_.down_scale = scales("down_scale", *down_scale, "R", params_.down.rows, "down");
    typed("up", *up, ScalarType::Char, "int8");
    params_.up_scale = scales("up_scale", *up_scale, "N", N_, "up");
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
    const bool is_codes = params_.scale != nullptr;
    check(header.dtype == (is_codes ? Dtype::kFloat32 : params_.dtype) && (header.is_codes != 0) == is_codes &&
              header.mask_row == (K_ + 7) / 8 && header.N == N_ && header.R == params_.down.rows &&
              header.count == params_.count,
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
  static std::string text(int64_t value) { return std::to_string(value); }

  void check_like(const char* argument, const Tensor& tensor) const {
    check_device(op_, argument, tensor, like_, like_name_);
    check_dtype(op_, argument, tensor, like_, like_name_);
  }

  void typed(const char* name, const Tensor& tensor, ScalarType dtype, const char* dtype_text) const {
    check(tensor.scalar_type() == dtype, op_, ": ", name, " must have dtype ", dtype_text, ", but it was ",
          dtype_name(tensor));
    check_contiguous(op_, name, tensor);
    check_device(op_, name, tensor, like_, like_name_);
  }

  const float* scales(const char* name, const Tensor& scale, const char* letter, int64_t rows, const char* of) const {
    if (!(scale.dim() == 1 && scale.size(0) == rows)) {
      const std::string symbol = letter;
      bad_shape(op_, name, "[" + symbol + "] with " + symbol + " = " + text(rows) + " (the rows of " + of + ")", scale);
    }
    typed(name, scale, ScalarType::Float, "float32");
    return static_cast<const float*>(scale.const_data_ptr());
  }

  void factors(const Tensor& down, const Tensor& up) {
    if (!(down.dim() == 2 && down.size(1) == K_))
      bad_shape(op_, "down", "[R, K] with K = " + text(K_) + " (the last dimension of x)", down);
    const int64_t R = down.size(0);
    check(R >= 1, op_, ": down must have at least one row (the rank R), but it had none");
    if (!(up.dim() == 2 && up.size(0) == N_ && up.size(1) == R))
      bad_shape(op_, "up",
                "[N, R] with N = " + text(N_) + " (the rows of mask) and R = " + text(R) + " (the rows of down)", up);
    params_.down = matrix_view(down);
    params_.up = matrix_view(up);
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
    const int64_t size = params_.scale ? 1 : element_size(params_.dtype);
    sample.add(params_.mask, 1, N_, (K_ + 7) / 8, (K_ + 7) / 8, 1);
    sample.add(params_.values, size, params_.count, 1, 1, 1);
    for (const MatrixView* view : {&params_.down, &params_.up}) {
      sample.add(view->data, size, view->rows, view->cols, view->row_stride, view->col_stride);
    }
    if (params_.scale) sample.add(params_.scale, sizeof(float), N_, 1, 1, 1);
    if (params_.down_scale) {
      sample.add(params_.down_scale, sizeof(float), params_.down.rows, 1, 1, 1);
      sample.add(params_.up_scale, sizeof(float), N_, 1, 1, 1);
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

Tensor int8_sparse_linear(const Tensor& x,             // [..., K]
                          const Tensor& mask,          // [N, ceil(K / 8)]
                          const Tensor& values,        // [nnz]
                          const Tensor& scale,         // [N]
                          const Optional& down,        // [R, K]
                          const Optional& down_scale,  // [R]
                          const Optional& up,          // [N, R]
                          const Optional& up_scale,    // [N]
                          const Optional& bias,        // [N]
                          const Optional& packed) {    // [bytes]; returns [..., N]
  SparseCall call("int8_sparse_linear", x, true);
  call.sparse(mask, values, &scale);
  call.branch(down, down_scale, up, up_scale);
  call.bias(bias);
  call.packed(packed);
  return call.run(x);
}

Tensor pack_int8_sparse(const Tensor& mask, const Tensor& values, const Tensor& scale, const Optional& down,
                        const Optional& down_scale, const Optional& up, const Optional& up_scale) {
  SparseCall call("_pack_int8_sparse", values, mask, down, true);
  call.sparse(mask, values, &scale);
  call.branch(down, down_scale, up, up_scale);
  return call.pack();
}

Tensor pack_sparse(const Tensor& mask, const Tensor& values, const Optional& down, const Optional& up) {
  SparseCall call("_pack_sparse", values, mask, down, false);
  call.sparse(mask, values);
  call.branch(down, up);
  return call.pack();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mixrank_kernels, m) {
  m.def("_pack_sparse(Tensor mask, Tensor values, Tensor? down=None, Tensor? up=None) -> Tensor");
  m.def(
      "_pack_int8_sparse(Tensor mask, Tensor values, Tensor scale, Tensor? down=None, Tensor? down_scale=None, "
      "Tensor? up=None, Tensor? up_scale=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixrank_kernels, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("_pack_sparse", TORCH_BOX(&pack_sparse));
  m.impl("int8_sparse_linear", TORCH_BOX(&int8_sparse_linear));
  m.impl("_pack_int8_sparse", TORCH_BOX(&pack_int8_sparse));
}

}  // namespace mixrank
