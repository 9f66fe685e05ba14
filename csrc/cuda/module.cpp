// The extension module mixrank_kernels._cuda, apart from _C so that _C loads with every torch. Importing it registers the operators
// of the *_op.cu files.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of mixrank_kernels: private operators that mixrank_kernels.cuda calls.";
  m.attr("cuda_version") = MIXRANK_CUDA_VERSION;
  m.attr("torch_version") = MIXRANK_TORCH_VERSION;
  m.attr("version") = MIXRANK_VERSION;
}
