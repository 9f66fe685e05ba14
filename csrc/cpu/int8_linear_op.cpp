// int8_linear and int8_lowrank_linear for the dispatch key CPU, and _pack_int8, which only mixrank_kernels.packing calls:
// what it returns is the `packed` of the other two.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>

#include "common/checks.h"
#include "cpu/isa.h"

namespace mixrank {
namespace {

using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

// Arguments of one call, checked in the order of the schema and turned into Int8LinearParams.
class Int8Call {
 public:
  Int8Call(const char* op, const Tensor& x, bool dynamic) : op_(op), like_(x), like_name_("x") {
    check(x.is_cpu(), op, ": x must be on cpu as the other arguments are");
    if (!(x.dim() >= 1)) bad_shape(op, "x", "[..., K]", x);
    params_.dtype = checked_dtype(op, "x", x);
    check(params_.dtype != Dtype::kFloat64, op,
          ": x must have one of the dtypes float32, bfloat16, float16, but it was float64");
    K_ = x.size(x.dim() - 1);
    check(K_ >= 1, op, ": x must have at least one feature (its last dimension), but it had none");
    params_.dynamic = dynamic;
  }

  // For _pack_int8, where nothing is multiplied.
  Int8Call(const char* op, const Tensor& weight, const char* name, bool dynamic)
      : op_(op), like_(weight), like_name_(name), K_(weight.dim() == 2 ? weight.size(1) : 0) {
    params_.dynamic = dynamic;
  }

  // `rows` and `cols` are the letters of the sizes; `cols_are` says what the second one must be.
  void weight(const char* name, const Tensor& codes, const char* rows, const char* cols, const char* cols_are) {
    const int64_t wanted = params_.count == 0 ? K_ : params_.weight[0].rows;
    if (!(codes.dim() == 2 && codes.size(1) == wanted))
      bad_shape(op_, name, std::string("[") + rows + ", " + cols + "] with " + cols + " = " + text(wanted) + cols_are, codes);
    check(codes.size(0) >= 1, op_, ": ", name, " must have at least one row, but it had none");
    check(wanted <= kMostTerms, op_, ": ", name, " must have at most ", kMostTerms, " columns, but it had ", wanted);
    typed(name, codes, ScalarType::Char, "int8");
    params_.weight[params_.count++] = {static_cast<const int8_t*>(codes.const_data_ptr()), nullptr, codes.size(0), wanted};
  }

  // The scales of the weight that was given last.
  void scale(const char* name, const Tensor& scale, const char* letter, const char* weight_name) {
    Int8Weight& weight = params_.weight[params_.count - 1];
    vector(name, scale, letter, weight.rows, " (the rows of " + std::string(weight_name) + ")");
    typed(name, scale, ScalarType::Float, "float32");
    weight.scale = static_cast<const float*>(scale.const_data_ptr());
  }

  void bias(const Optional& bias, const char* out_features, bool is_pivoted) {
    N_ = params_.weight[params_.count - 1].rows + (is_pivoted ? params_.weight[0].rows : 0);
    if (!bias) return;
    vector("bias", *bias, "N", N_, out_features);
    check_device(op_, "bias", *bias, like_, like_name_);
    check_dtype(op_, "bias", *bias, like_, like_name_);
    params_.bias = bias->const_data_ptr();
    params_.bias_stride = bias->stride(0);
  }

  void index(const Optional& index) {
    if (!index) return;
    vector("index", *index, "N", N_, " (the rows of down and of up)");
    typed("index", *index, ScalarType::Long, "int64");
    params_.index = static_cast<const int64_t*>(index->const_data_ptr());
    static thread_local std::vector<char> seen;
    seen.assign(N_, 0);
    for (int64_t n = 0; n < N_; ++n) {
      const int64_t to = params_.index[n];
      check(to >= 0 && to < N_ && !seen[to], op_, ": index must hold every number from 0 to ", N_ - 1,
            " once, but entry ", n, " was ", to);
      seen[to] = 1;
    }
  }

  void packed(const Optional& packed) {
    if (!packed) return;
    check(packed->scalar_type() == ScalarType::Byte, op_, ": packed must have dtype uint8, but it was ",
          dtype_name(*packed));
    if (!(packed->dim() == 1)) bad_shape(op_, "packed", "[bytes]", *packed);
    check_contiguous(op_, "packed", *packed);
    check_device(op_, "packed", *packed, like_, like_name_);
    const void* data = packed->const_data_ptr();
    PackedInt8Header header;
    const bool has_header = packed->size(0) >= static_cast<int64_t>(sizeof(header));
    if (has_header) memcpy(&header, data, sizeof(header));
    check(has_header && memcmp(header.magic, kPackedInt8Magic, sizeof(header.magic)) == 0, op_,
          ": packed must come from mixrank_kernels.packing, but it has another content");
    bool same = header.count == params_.count && (header.dynamic != 0) == params_.dynamic;
    for (int f = 0; f < 2; ++f) {
      same = same && header.rows[f] == params_.weight[f].rows && header.cols[f] == params_.weight[f].cols;
    }
    check(same, op_, ": packed must be made from these weights, but it was made for ", header.count, " of ",
          header.rows[0], " x ", header.cols[0], " and ", header.rows[1], " x ", header.cols[1],
          header.dynamic ? " with" : " without", " dynamic");
    // Packed for another instruction set or at an odd address, it is of no use, and the codes themselves serve.
    if (header.isa != kernels().isa_id || reinterpret_cast<uintptr_t>(data) % 64 != 0) return;
    check(packed->size(0) == kernels().int8_pack(params_, nullptr), op_, ": packed must be whole, but it was cut");
    if (header.sample != sample()) return;  // the codes have changed since: they count
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
    kernels().int8_linear(params_);
    return y;
  }

  Tensor pack() {
    params_.sample = sample();
    Tensor packed = torch::stable::new_empty(like_, {kernels().int8_pack(params_, nullptr)}, ScalarType::Byte);
    kernels().int8_pack(params_, packed.mutable_data_ptr());
    return packed;
  }

 private:
  static std::string text(int64_t value) { return std::to_string(value); }

  void vector(const char* name, const Tensor& tensor, const char* letter, int64_t size, const std::string& what) const {
    if (tensor.dim() == 1 && tensor.size(0) == size) return;
    const std::string symbol = letter;
    bad_shape(op_, name, "[" + symbol + "] with " + symbol + " = " + text(size) + what, tensor);
  }

  void typed(const char* name, const Tensor& tensor, ScalarType dtype, const char* dtype_text) const {
    check(tensor.scalar_type() == dtype, op_, ": ", name, " must have dtype ", dtype_text, ", but it was ",
          dtype_name(tensor));
    check_contiguous(op_, name, tensor);
    check_device(op_, name, tensor, like_, like_name_);
  }

  // A hash of a few codes of every weight: as in weight_sample.h, a write that torch does not count shows here.
  uint64_t sample() const {
    constexpr int64_t kSamples = 16;
    uint64_t hash = 14695981039346656037u;
    for (int32_t f = 0; f < params_.count; ++f) {
      const int64_t last = params_.weight[f].rows * params_.weight[f].cols - 1;
      for (int64_t i = 0; i < kSamples; ++i) {
        hash = (hash ^ static_cast<uint8_t>(params_.weight[f].codes[i * last / (kSamples - 1)])) * 1099511628211u;
      }
    }
    return hash;
  }

  const char* op_;
  const Tensor& like_;
  const char* like_name_;
  int64_t K_ = 0, N_ = 0;
  Int8LinearParams params_{};
};

constexpr char kOfX[] = " (the last dimension of x)";
constexpr char kOfDown[] = " (the rows of down)";

Tensor int8_linear(const Tensor& x,           // [..., K]
                   const Tensor& weight,      // [N, K]
                   const Tensor& scale,       // [N]
                   const Optional& bias,      // [N]
                   bool dynamic,
                   const Optional& packed) {  // [bytes]; returns [..., N]
  Int8Call call("int8_linear", x, dynamic);
  call.weight("weight", weight, "N", "K", kOfX);
  call.scale("scale", scale, "N", "weight");
  call.bias(bias, " (the rows of weight)", false);
  call.packed(packed);
  return call.run(x);
}

Tensor int8_lowrank_linear(const Tensor& x,           // [..., K]
                           const Tensor& down,        // [R, K]
                           const Tensor& down_scale,  // [R]
                           const Tensor& up,          // [N, R], or [N - R, R] with an index
                           const Tensor& up_scale,    // [rows of up]
                           const Optional& bias,      // [N]
                           bool dynamic,
                           const Optional& index,     // [N]
                           const Optional& packed) {  // [bytes]; returns [..., N]
  Int8Call call("int8_lowrank_linear", x, dynamic);
  call.weight("down", down, "R", "K", kOfX);
  call.scale("down_scale", down_scale, "R", "down");
  call.weight("up", up, "N", "R", kOfDown);
  call.scale("up_scale", up_scale, "N", "up");
  call.bias(bias, index ? " (the rows of down and of up)" : " (the rows of up)", index.has_value());
  call.index(index);
  call.packed(packed);
  return call.run(x);
}

Tensor pack_int8(const Tensor& first, const Optional& second, bool dynamic) {
  Int8Call call("_pack_int8", first, "first", dynamic);
  call.weight("first", first, "N", "K", kOfX);
  if (second) call.weight("second", *second, "N", "R", kOfDown);
  return call.pack();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mixrank_kernels, m) {
  m.def("_pack_int8(Tensor first, Tensor? second, bool dynamic) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixrank_kernels, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_lowrank_linear", TORCH_BOX(&int8_lowrank_linear));
  m.impl("_pack_int8", TORCH_BOX(&pack_int8));
}

}  // namespace mixrank
