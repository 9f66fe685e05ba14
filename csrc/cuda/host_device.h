// Functions that run on the host and on the device alike.
#pragma once

#ifdef __CUDACC__
#define MIXRANK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MIXRANK_HOST_DEVICE inline
#endif
