// The loops that decide the CPU engine's speed, compiled once per instruction set from hot_loops.inl
// and chosen at run time. Every variant returns the same bits.
#pragma once

#include <cstdint>

#include "cacovid/dtype.h"

namespace cacovid::cpu {

constexpr int64_t key_block = 64;  // key buffers are padded to a multiple of this
constexpr int64_t padded(int64_t n) { return (n + key_block - 1) / key_block * key_block; }

struct FrameShape {
  int64_t rows, columns, row_stride, column_stride;  // strides in elements
};

struct HotLoops {
  const char* name;

  // Order keys of n scores, `stride` elements apart; buffer of padded(n). Returns status bits.
  int32_t (*load_keys)(const void* scores, DType dtype, int64_t stride, int64_t n, uint32_t* keys);

  // Positions of the k largest keys, ascending, the lower index first among equals; 0 <= k <= n.
  void (*top_positions)(const uint32_t* keys, int64_t n, int64_t k, int32_t* positions);

  // One frame of hidden states, read once: 1 / sqrt(mean square + eps) of every row, and the mean row.
  // `sums` is scratch of padded(columns).
  void (*pool_frame)(const void* hidden, DType dtype, const FrameShape& shape, float eps, float* rrms, float* mean,
                     float* sums);
};

const HotLoops& hot_loops();  // the best variant this CPU runs

extern const HotLoops baseline_loops;
#if defined(__x86_64__)
extern const HotLoops avx2_loops;
extern const HotLoops avx512_loops;
#endif

}  // namespace cacovid::cpu
