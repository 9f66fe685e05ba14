// From tensors to plain parameters: every check of what a caller passes, with messages that name the argument, what it
// was and what it must be. Only the stable ABI of torch is used here and in the *_op files.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/types.h"

namespace mixrank {

using torch::stable::Tensor;

// Unlike STD_TORCH_CHECK, this leaves the source file and line out of what users read.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(condition, true)) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "bfloat16"
std::string dtype_name(const Tensor& tensor);
// "[64, 192]"
std::string shape_of(const Tensor& tensor);
std::string shape_text(const std::vector<int64_t>& sizes);

// One of the dtypes of the kernels; for a `master` (an accumulator) only the wide ones.
Dtype checked_dtype(const char* op, const char* argument, const Tensor& tensor, bool master = false);
// int32 or int64.
void check_index_dtype(const char* op, const char* argument, const Tensor& tensor, bool short_too = false);
// The device and the dtype of the argument called `like_name`.
void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like,
                  const char* like_name);
void check_dtype(const char* op, const char* argument, const Tensor& tensor, const Tensor& like, const char* like_name);
// Not a check: `wanted` is text that only a failure should pay for.
[[noreturn]] void bad_shape(const char* op, const char* argument, const std::string& wanted, const Tensor& tensor);
void check_contiguous(const char* op, const char* argument, const Tensor& tensor);
// Errors if the memory that the two tensors may touch overlaps.
void check_no_overlap(const char* op, const char* argument, const Tensor& tensor, const char* other,
                      const Tensor& other_tensor);
// a * b, or an error that names what would be too large.
int64_t checked_product(const char* op, const char* what, int64_t a, int64_t b);

int64_t element_size(Dtype dtype);

// Uninitialised, contiguous, with the dtype and device of `like`.
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape);

// A 2-D tensor as it is.
MatrixView matrix_view(const Tensor& tensor);

// All leading dimensions of a tensor [..., K] as rows. Keeps the offsets of the rows alive where they are not uniform.
class RowsView {
 public:
  explicit RowsView(const Tensor& tensor);
  const MatrixView& view() const { return view_; }

 private:
  std::vector<int64_t> offsets_;
  MatrixView view_;
};

}  // namespace mixrank
