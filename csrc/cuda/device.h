// The instructions of the device, or what stands for them where kernels run without one.
#pragma once

#ifdef __CUDACC__
#include "cuda/ptx.h"
#else
#include "emulator/ptx.h"
#endif
