// Launches on torch's current stream of a device; see launch.h for what a Launcher is. Nothing here allocates or
// synchronises, so that launches can be captured in a graph.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "common/checks.h"
#include "cuda/entry.cuh"
#include "cuda/ptx.h"

namespace mixrank {

inline void check_cuda(cudaError_t status, const char* what) {
  check(status == cudaSuccess, what, " failed: ", cudaGetErrorString(status));
}

class Launcher {
 public:
  explicit Launcher(const Tensor& like) : device_(like.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "torch has no current stream for device ", device_);
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device_), "cudaDeviceGetAttribute");
  }

  int architecture() const { return major_ == 9 ? 90 : 80; }

  TensorMap map(const void* base, int64_t cols, int64_t rows, int64_t batches, int64_t row_stride, int64_t batch_stride,
                int box_rows) const {
    const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows),
                                 static_cast<cuuint64_t>(batches)};
    // The stride of the only batch is not used, but has to be one.
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_stride) * 2,
                                   static_cast<cuuint64_t>(batches > 1 ? batch_stride : row_stride) * 2};
    const cuuint32_t box[3] = {kBoxCols, static_cast<cuuint32_t>(box_rows), 1}, steps[3] = {1, 1, 1};
    TensorMap made;
    const CUresult status = encoder()(&made, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(base), sizes, strides,
                                      box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(status));
    return made;
  }

  template <class Kernel>
  void launch(int64_t blocks, const typename Kernel::Params& params, bool overlaps) const {
    check(blocks < (int64_t{1} << 31), "a launch has at most 2^31 - 1 blocks, but it needed ", blocks);
    // Once for each device, as it takes longer than a launch.
    static std::atomic<uint64_t> raised{0};
    const uint64_t bit = uint64_t{1} << (device_ % 64);
    if (Kernel::kSharedBytes > 48 * 1024 && (device_ >= 64 || (raised.load() & bit) == 0)) {
      check_cuda(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes),
                 "cudaFuncSetAttribute");
      raised |= bit;
    }
    cudaLaunchAttribute attributes[2];
    unsigned count = 0;
    if (overlaps && architecture() == 90) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if constexpr (requires { Kernel::kCluster; }) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {Kernel::kCluster, 1, 1};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(Kernel::kThreads);
    config.dynamicSmemBytes = Kernel::kSharedBytes;
    config.stream = stream_;
    config.attrs = attributes;
    config.numAttrs = count;
    check_cuda(cudaLaunchKernelEx(&config, entry<Kernel>, params), "cudaLaunchKernelEx");
  }

 private:
  // Asked of the driver at run time, so that the module loads where there is none.
  static decltype(&cuTensorMapEncodeTiled) encoder() {
    static const auto found = [] {
      void* function = nullptr;
      cudaDriverEntryPointQueryResult result;
      check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
                 "cudaGetDriverEntryPointByVersion");
      check(result == cudaDriverEntryPointSuccess, "this driver has no cuTensorMapEncodeTiled");
      return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    return found;
  }

  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int major_ = 0;
};

}  // namespace mixrank
