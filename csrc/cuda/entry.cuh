// The __global__ function of a kernel: empty where its architecture's instructions are not to be had.
#pragma once

namespace mixrank {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    entry(const __grid_constant__ typename Kernel::Params params) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (Kernel::kArchitecture == 80)
#endif
  {
    Kernel::run(params);
  }
}

}  // namespace mixrank
