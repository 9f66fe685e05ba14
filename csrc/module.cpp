// The extension module mixrank_kernels._C. Importing it registers the CPU kernels (the schemas must already be
// defined, see mixrank_kernels/_schema.py); what it holds itself is about the build and the choice of kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "cpu/isa.h"

namespace py = pybind11;

namespace mixrank {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  const std::string cuda = MIXRANK_CUDA_VERSION;
  info["version"] = MIXRANK_VERSION;
  info["torch"] = MIXRANK_TORCH_VERSION;
  info["compiler"] = compiler();
  info["cpp_standard"] = __cplusplus;
  info["cuda"] = !cuda.empty();
  info["cuda_version"] = cuda.empty() ? py::object(py::none()) : py::cast(cuda);
  info["isas"] = compiled_isas();
  return info;
}

py::dict features() {
  py::dict found;
  for (const auto& [name, supported] : cpu_features()) found[py::str(name)] = supported;
  return found;
}

double peak_flops(const std::string& kind, double milliseconds) {
  const bool pairs = kind == "bfloat16", codes = kind == "int8";
  if (kind != "float32" && !pairs && !codes) {
    throw py::value_error("peak_flops: kind must be 'float32', 'bfloat16' or 'int8', but it was '" + kind + "'");
  }
  if (!(milliseconds > 0)) throw py::value_error("peak_flops: milliseconds must be above zero");
  const auto loop = pairs ? kernels().bfloat_loop : codes ? kernels().int8_loop : kernels().float_loop;
  if (loop == nullptr) {
    throw py::value_error("peak_flops: the instruction set " + std::string(kernels().isa) +
                          " has no instruction for bfloat16");
  }
  const py::gil_scoped_release release;
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double flops = 0, seconds = 0;
  do {
    flops += static_cast<double>(loop(1 << 14));
    seconds = std::chrono::duration<double>(Clock::now() - start).count();
  } while (seconds * 1e3 < milliseconds);
  return flops / seconds;
}

std::string choose(const std::string& op, const std::string& dtype) {
  const KernelTable& table = kernels();
  const bool is_gram = op == "gram_accumulate_", is_codes = op == "int8_sparse_linear";
  const bool is_int8 = is_codes || op == "int8_linear" || op == "int8_lowrank_linear";
  const bool is_sparse = op == "sparse_linear";
  if (!is_gram && !is_int8 && !is_sparse && op != "lowrank_linear" && op != "lowrank_residual_linear" &&
      op != "pivoted_linear" && op != "cross_gram_accumulate_") {
    throw py::value_error("choose: op must be the name of an operator, but it was '" + op + "'");
  }
  if (dtype != "float32" && dtype != "float64" && dtype != "bfloat16" && dtype != "float16") {
    throw py::value_error("choose: dtype must be 'float32', 'float64', 'bfloat16' or 'float16', but it was '" + dtype +
                          "'");
  }
  const std::string isa = table.isa, tile = table.float_tile;
  if (is_int8 && dtype == "float64") {
    throw py::value_error("choose: dtype must be 'float32', 'bfloat16' or 'float16' for " + op +
                          ", but it was 'float64'");
  }
  if (is_codes) {
    return isa + ": " + dtype + " as fp32, each stored entry times a tile of tokens, 8-bit codes widened while packing";
  }
  if (is_int8) return isa + ": " + dtype + " as 8-bit codes (" + table.int8_products + ") or as fp32, tiles of " + tile;
  if (is_sparse) {
    return isa + ": " + (dtype == "float64" || dtype == "float32" ? dtype : dtype + " widened to fp32") +
           ", each stored entry times a tile of tokens";
  }
  if (dtype == "float64") return isa + ": fp64 tiles of " + table.double_tile;
  if (dtype == "float32") return isa + ": fp32 tiles of " + tile;
  if (dtype == "bfloat16" && table.bfloat_pairs) {
    return isa + ": bf16 pairs (vdpbf16ps) in tiles of " + tile + (is_gram ? "; with row weights widened to fp32" : "");
  }
  return isa + ": " + dtype + " widened to fp32 while packing, tiles of " + tile;
}

}  // namespace
}  // namespace mixrank

PYBIND11_MODULE(_C, m) {
  using namespace mixrank;
  m.doc() = "Compiled kernels of mixrank_kernels: build information, CPU features and the choice of instruction set.";
  m.def("build_info", &build_info, "What this module was built from and for.");
  m.def("cpu_features", &features, "Instruction sets that the processor has and the operating system allows.");
  m.def("supported_isas", &supported_isas, "Names that set_isa takes on this machine, best first.");
  m.def("get_isa", [] { return std::string(kernels().isa); }, "The instruction set in use by this process.");
  m.def("set_isa", &set_isa, py::arg("name"), "Choose the instruction set for this process; 'auto' is the best one.");
  m.def("peak_flops", &peak_flops, py::arg("kind"), py::arg("milliseconds"),
        "Operations per second of one thread in a loop of register multiply-adds; kind is 'float32', 'bfloat16' or 'int8'.");
  m.def("choose", &choose, py::arg("op"), py::arg("dtype"),
        "The kernel that serves an operator for a dtype, in words.");
}
