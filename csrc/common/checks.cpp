#include "common/checks.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

namespace mixrank {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;

struct ByteRange {
  const char* begin;
  const char* end;
};

// Of a tensor that has elements.
ByteRange touched(const Tensor& tensor) {
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {data, data + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

std::string device_name(const Tensor& tensor) {
  switch (tensor.device().type()) {
    case DeviceType::CPU:
      return "cpu";
    case DeviceType::CUDA:
      return "cuda";
    case DeviceType::Meta:
      return "meta";
    default:
      return "another device";
  }
}

}  // namespace

std::string dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(tensor.scalar_type());
  }
}

std::string shape_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

std::string shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return shape_text(std::vector<int64_t>(sizes.begin(), sizes.end()));
}

Dtype checked_dtype(const char* op, const char* argument, const Tensor& tensor, bool master) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return Dtype::kFloat32;
  if (dtype == ScalarType::Double) return Dtype::kFloat64;
  if (!master && dtype == ScalarType::BFloat16) return Dtype::kBFloat16;
  if (!master && dtype == ScalarType::Half) return Dtype::kFloat16;
  check(false, op, ": ", argument, " must have one of the dtypes ",
        master ? "float64, float32" : "float32, bfloat16, float16, float64", ", but it was ", dtype_name(tensor));
  __builtin_unreachable();
}

void check_index_dtype(const char* op, const char* argument, const Tensor& tensor, bool short_too) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Int || dtype == ScalarType::Long || (short_too && dtype == ScalarType::Short), op, ": ",
        argument, " must have one of the dtypes ", short_too ? "int16, " : "", "int32, int64, but it was ",
        dtype_name(tensor));
}

void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like,
                  const char* like_name) {
  if (tensor.is_cpu() == like.is_cpu()) return;
  check(false, op, ": ", argument, " must be on ", device_name(like), " as ", like_name, " is, but it was on ",
        device_name(tensor));
}

void check_dtype(const char* op, const char* argument, const Tensor& tensor, const Tensor& like,
                 const char* like_name) {
  if (tensor.scalar_type() == like.scalar_type()) return;
  check(false, op, ": ", argument, " must have dtype ", dtype_name(like), " as ", like_name, " has, but it was ",
        dtype_name(tensor));
}

void bad_shape(const char* op, const char* argument, const std::string& wanted, const Tensor& tensor) {
  check(false, op, ": ", argument, " must have shape ", wanted, ", but it was ", shape_of(tensor));
  __builtin_unreachable();
}

void check_contiguous(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.is_contiguous()) return;
  const auto strides = tensor.strides();
  check(false, op, ": ", argument, " must be contiguous, but its strides were ",
        shape_text(std::vector<int64_t>(strides.begin(), strides.end())));
}

void check_no_overlap(const char* op, const char* argument, const Tensor& tensor, const char* other,
                      const Tensor& other_tensor) {
  if (tensor.numel() == 0 || other_tensor.numel() == 0) return;
  const ByteRange a = touched(tensor), b = touched(other_tensor);
  check(a.end <= b.begin || b.end <= a.begin, op, ": ", argument, " must not share memory with ", other,
        ", but they overlap");
}

int64_t checked_product(const char* op, const char* what, int64_t a, int64_t b) {
  int64_t product = 0;
  check(!__builtin_mul_overflow(a, b, &product), op, ": ", what, " must have fewer than 2^63 elements, but it had ", a,
        " x ", b);
  return product;
}

int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return 8;
    case Dtype::kFloat32:
      return 4;
    default:
      return 2;
  }
}

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
  int32_t device_type, device_index, dtype, layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  AtenTensorHandle made;
  // Not torch::stable::new_empty, which looks the operator up by name at every call.
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), static_cast<int64_t>(shape.size()), &dtype,
                                                   &layout, &device_type, device_index, nullptr, &made));
  return Tensor(made);
}

MatrixView matrix_view(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1), nullptr};
}

RowsView::RowsView(const Tensor& tensor) {
  const int64_t dims = tensor.dim(), leading = dims - 1;
  int64_t rows = 1, row_stride = 0;
  bool uniform = true;
  // From the innermost leading dimension outwards: uniform while each one continues where the last one ended.
  for (int64_t i = leading - 1; i >= 0; --i) {
    const int64_t size = tensor.size(i);
    if (size != 1 && rows == 1) row_stride = tensor.stride(i);
    if (size != 1 && rows > 1) uniform = uniform && tensor.stride(i) == rows * row_stride;
    rows *= size;
  }
  if (!uniform && rows > 0) {
    offsets_.assign(1, 0);
    offsets_.reserve(rows);
    for (int64_t i = 0; i < leading; ++i) {
      const size_t before = offsets_.size();
      std::vector<int64_t> next;
      next.reserve(before * tensor.size(i));
      for (const int64_t offset : offsets_) {
        for (int64_t j = 0; j < tensor.size(i); ++j) next.push_back(offset + j * tensor.stride(i));
      }
      offsets_ = std::move(next);
    }
  }
  view_ = {tensor.const_data_ptr(), rows,
           tensor.size(leading),    row_stride,
           tensor.stride(leading),  offsets_.empty() ? nullptr : offsets_.data()};
}

}  // namespace mixrank
