#include <cuda_runtime.h>

#include "cacovid/cuda.h"

namespace cacovid::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

Versions versions() {
  Versions v = {0, 0};
  cudaDriverGetVersion(&v.driver);
  cudaRuntimeGetVersion(&v.runtime);
  return v;
}

}  // namespace cacovid::cuda
