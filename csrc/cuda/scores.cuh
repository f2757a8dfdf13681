// Scores of any float type and layout, read one at a time.
#pragma once

#include <cuda_runtime.h>

#include "cacovid/division.h"
#include "cacovid/tensor.h"

namespace cacovid::cuda {

// A tensor of 1 to 3 axes as a kernel's argument.
struct Scores {
  const char* data;
  DType dtype;
  int32_t ndim;
  int64_t inner;       // size of the second axis of three, or of two
  int64_t strides[3];  // in elements

  Scores() = default;
  explicit Scores(const Tensor& t)
      : data(t.as<const char>()),
        dtype(t.dtype),
        ndim(t.ndim),
        inner(t.ndim > 1 ? t.sizes[1] : 1),
        strides{t.strides[0], t.strides[1], t.strides[2]} {}

  // Where row `row`, which starts at flat position `start`, begins; its elements are `step` apart.
  __device__ __forceinline__ int64_t row(int64_t row, int64_t start) const {
    if (ndim == 1) return start * strides[0];
    if (ndim == 2) return row * strides[0];
    const Division at = divide(row, inner);
    return at.quotient * strides[0] + at.remainder * strides[1];
  }
  __device__ __forceinline__ int64_t step() const { return strides[ndim - 1]; }

  // Where element i of [F] or [B, T] is.
  __device__ __forceinline__ int64_t element(int64_t i) const {
    if (ndim == 1) return i * strides[0];
    const Division at = divide(i, inner);
    return at.quotient * strides[0] + at.remainder * strides[1];
  }

  __device__ __forceinline__ float load(int64_t at) const {
    if (dtype == DType::f32) return __ldg(reinterpret_cast<const float*>(data) + at);
    const uint16_t bits = __ldg(reinterpret_cast<const uint16_t*>(data) + at);
    return dtype == DType::bf16 ? load_float(bf16_t{bits}) : load_float(f16_t{bits});
  }
};

}  // namespace cacovid::cuda
