// A tensor as the core sees it: a pointer, a shape and strides. It owns nothing.
#pragma once

#include <cstdint>

#include "cacovid/dtype.h"

namespace cacovid {

constexpr int max_dims = 8;

struct Tensor {
  void* data = nullptr;  // first element; may be null when the tensor is empty or absent
  DType dtype = DType::f32;
  int32_t ndim = 0;
  int64_t sizes[max_dims] = {};
  int64_t strides[max_dims] = {};  // in elements; 0 for a broadcast axis, never negative

  bool defined() const { return ndim > 0; }
  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= sizes[d];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != expected) return numel() == 0;
      expected *= sizes[d];
    }
    return true;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace cacovid
