// The extension module mixrank_kernels._C. Importing it registers the CPU kernels (the schemas must already be
// defined, see mixrank_kernels/_schema.py); what it holds itself is about the build and the choice of kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

std::string choose(const std::string& op, const std::string& dtype) {
  const KernelTable& table = kernels();
  const bool is_gram = op == "gram_accumulate_";
  if (!is_gram && op != "lowrank_linear" && op != "lowrank_residual_linear" && op != "cross_gram_accumulate_") {
    throw py::value_error("choose: op must be the name of an operator, but it was '" + op + "'");
  }
  if (dtype != "float32" && dtype != "float64" && dtype != "bfloat16" && dtype != "float16") {
    throw py::value_error("choose: dtype must be 'float32', 'float64', 'bfloat16' or 'float16', but it was '" + dtype +
                          "'");
  }
  const std::string isa = table.isa, tile = table.float_tile;
  if (dtype == "float64") return isa + ": fp64 tiles of " + table.double_tile;
  if (dtype == "float32") return isa + ": fp32 tiles of " + tile;
  if (dtype == "bfloat16" && table.bfloat_pairs) {
    return isa + ": bf16 pairs (vdpbf16ps) in tiles of " + tile +
           (is_gram ? "; with row weights widened to fp32" : "");
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
  m.def("choose", &choose, py::arg("op"), py::arg("dtype"), "The kernel that serves an operator for a dtype, in words.");
}
