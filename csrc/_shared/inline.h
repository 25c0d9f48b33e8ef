// Functions that a CPU and a GPU share: FASTVID_INLINE stands before their declaration.

#pragma once

#ifdef __CUDACC__
#define FASTVID_INLINE __host__ __device__ __forceinline__
#else
#define FASTVID_INLINE inline
#endif
