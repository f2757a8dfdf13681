// Functions that have one definition for the CPU engine and for CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define CACOVID_HD __host__ __device__ __forceinline__
#else
// Always inlined: one source is compiled for several instruction sets, and a shared out-of-line copy
// could be the one that the running CPU does not have.
#define CACOVID_HD inline __attribute__((always_inline))
#endif
