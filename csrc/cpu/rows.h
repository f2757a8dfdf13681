// Frames of a packed or dense score tensor as rows of memory.
#pragma once

#include "cacovid/tensor.h"

namespace cacovid::cpu {

struct Row {
  const void* data;
  int64_t stride;
};

inline const void* offset(const Tensor& t, int64_t elements) {
  return static_cast<const char*>(t.data) + elements * item_size(t.dtype);
}

// Row `index` of [N] (starting at flat position `start`), [S, P] or [B, T, P].
inline Row row_of(const Tensor& t, int64_t index, int64_t start) {
  if (t.ndim == 1) return {offset(t, start * t.strides[0]), t.strides[0]};
  if (t.ndim == 2) return {offset(t, index * t.strides[0]), t.strides[1]};
  return {offset(t, index / t.sizes[1] * t.strides[0] + index % t.sizes[1] * t.strides[1]), t.strides[2]};
}

// Element `i` of a row as float.
inline float load_element(const Row& row, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::bf16: return load_float(static_cast<const bf16_t*>(row.data)[i * row.stride]);
    case DType::f16: return load_float(static_cast<const f16_t*>(row.data)[i * row.stride]);
    default: return static_cast<const float*>(row.data)[i * row.stride];
  }
}

// Element `index` of [F] or [B, T] as float.
inline float element_of(const Tensor& t, int64_t index) {
  const int64_t at =
      t.ndim == 1 ? index * t.strides[0] : index / t.sizes[1] * t.strides[0] + index % t.sizes[1] * t.strides[1];
  return load_element({t.data, 1}, t.dtype, at);
}

}  // namespace cacovid::cpu
