#include "common/checks.h"

#include <torch/headeronly/core/ScalarType.h>

namespace mixrank {
namespace {

using torch::headeronly::ScalarType;

struct ByteRange {
  const char* begin;
  const char* end;
};

ByteRange touched(const Tensor& tensor) {
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {data, data};
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {data, data + (last + 1) * tensor.element_size()};
}

}  // namespace

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
    default:
      return torch::headeronly::toString(tensor.scalar_type());
  }
}

Dtype checked_dtype(const char* op, const char* argument, const Tensor& tensor) {
  check(tensor.is_cpu(), op, ": ", argument, " must be on the CPU like x, but it was on another device");
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      check(false, op, ": ", argument, " must be float32, float64, bfloat16 or float16, but it was ",
            dtype_name(tensor));
  }
  return Dtype::kFloat32;
}

void check_same_dtype(const char* op, const char* argument, const Tensor& tensor, const char* like,
                      const Tensor& like_tensor) {
  checked_dtype(op, argument, tensor);
  check(tensor.scalar_type() == like_tensor.scalar_type(), op, ": ", argument, " must be ", dtype_name(like_tensor),
        " like ", like, ", but it was ", dtype_name(tensor));
}

void check_shape(const char* op, const char* argument, const Tensor& tensor, const std::vector<int64_t>& expected,
                 const std::string& meaning) {
  const auto sizes = tensor.sizes();
  check(std::vector<int64_t>(sizes.begin(), sizes.end()) == expected, op, ": ", argument, " must have shape ",
        shape_text(expected), " (", meaning, "), but it was ", shape_of(tensor));
}

void check_no_overlap(const char* op, const char* argument, const Tensor& tensor, const char* other,
                      const Tensor& other_tensor) {
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
  view_ = {tensor.const_data_ptr(), rows, tensor.size(leading), row_stride, tensor.stride(leading),
           offsets_.empty() ? nullptr : offsets_.data()};
}

}  // namespace mixrank
