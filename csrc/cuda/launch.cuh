// How kernels are launched and what they share with their launchers.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cacovid/cuda.h"

namespace cacovid::cuda {

constexpr int warp_lanes = 32;
constexpr int64_t most_blocks = 2147483647;      // of a grid, along x
constexpr size_t plain_shared_bytes = 48 << 10;  // more has to be asked for
constexpr size_t most_shared_bytes = 99 << 10;   // of a block, on every GPU from sm_80 on

#if defined(__CUDACC__)
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#define CACOVID_SHARED dynamic_shared
#else
#define CACOVID_SHARED ::simt::dynamic_shared
#endif

// The dynamic shared memory of the block.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  return reinterpret_cast<T*>(CACOVID_SHARED);
}

// Makes the stream's device current, and the former one again at the end.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      moved_ = error_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_ = cudaSuccess;
  bool moved_ = false;
};

// Enqueues one kernel; an empty grid enqueues nothing.
template <class... Expected, class... Actual>
int launch(Stream stream, void (*kernel)(Expected...), int64_t blocks, int threads, size_t shared_bytes,
           const Actual&... arguments) {
  if (blocks <= 0) return cudaSuccess;
  if (blocks > most_blocks) return cudaErrorInvalidValue;
  const OnDevice on(stream.device);
  if (on.error() != cudaSuccess) return on.error();
  if (shared_bytes > plain_shared_bytes) {
    // Always the same: what one launch asks for holds for the kernel, and so for those of other threads.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  cudaGetLastError();  // told the caller; torch would blame the next op for it
  return error;
}

}  // namespace cacovid::cuda
