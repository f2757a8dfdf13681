// A tensor seen as tokens along one of its axes: what gather reads and writes.
#pragma once

#include "cacovid/division.h"
#include "cacovid/host_device.h"
#include "cacovid/tensor.h"

namespace cacovid {

// A token's elements are one contiguous row if memory allows it, else several; the axes that number a token's rows, and
// those outside the token axis, are merged where strides allow it. All strides and steps are bytes.
struct TokenRows {
  struct Axis {
    int64_t size, source_stride, target_stride;
  };
  const char* source = nullptr;
  char* target = nullptr;
  int64_t tokens = 0, source_step = 0, target_step = 0;  // steps from token to token
  int64_t bytes = 0;                                     // of a row
  int64_t segments = 1;                                  // rows of a token: the product of the axes
  Axis axes[max_dims] = {};
  int32_t count = 0;

  TokenRows() = default;
  // `target` is contiguous with `kept` tokens in place of x's axis `dim`.
  TokenRows(const Tensor& x, int32_t dim, void* target, int64_t kept)
      : source(static_cast<const char*>(x.data)), target(static_cast<char*>(target)), tokens(x.sizes[dim]) {
    const int64_t item = item_size(x.dtype);
    int64_t target_strides[max_dims] = {}, stride = item;
    for (int32_t d = x.ndim - 1; d >= 0; --d) {
      target_strides[d] = stride;
      stride *= d == dim ? kept : x.sizes[d];
    }
    bytes = item;
    int32_t last = x.ndim;  // the axes from here on lie in memory as in the target
    while (last > dim + 1 && (x.sizes[last - 1] == 1 || x.strides[last - 1] * item == bytes)) {
      bytes *= x.sizes[--last];
    }
    for (int32_t d = 0; d < last; ++d) {
      if (d != dim) add(x.sizes[d], x.strides[d] * item, target_strides[d]);
    }
    source_step = x.strides[dim] * item;
    target_step = target_strides[dim];
  }

  struct Offsets {
    int64_t source, target;
  };
  CACOVID_HD Offsets segment(int64_t number) const {
    Offsets at = {0, 0};
    for (int32_t a = count - 1; a >= 0; --a) {
      const Division by = divide(number, axes[a].size);
      number = by.quotient;
      at.source += by.remainder * axes[a].source_stride;
      at.target += by.remainder * axes[a].target_stride;
    }
    return at;
  }

 private:
  void add(int64_t size, int64_t source_stride, int64_t target_stride) {
    segments *= size;
    if (size == 1) return;
    if (count > 0) {
      Axis& outer = axes[count - 1];
      if (outer.source_stride == size * source_stride && outer.target_stride == size * target_stride) {
        outer = {outer.size * size, source_stride, target_stride};
        return;
      }
    }
    axes[count++] = {size, source_stride, target_stride};
  }
};

}  // namespace cacovid
