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

constexpr int64_t batch_rows = 4;  // most rows of one call of top_masks

// A row's keys (padded(n) of them) and what loading found out about them.
struct KeyRow {
  uint32_t* keys;
  uint32_t smallest, largest;
  int32_t status;
};

struct AttentionLoops;    // attention_loops.h
struct CombinationLoops;  // combination_loops.h
struct NoiseLoops;        // noise_loops.h
struct PolicyLoops;       // policy_loops.h
struct RowLoops;          // row_loops.h

struct HotLoops {
  const char* name;

  // Order keys of n >= 1 scores, `stride` elements apart, into row.keys; padding keys are 0.
  void (*load_keys)(const void* scores, DType dtype, int64_t stride, int64_t n, KeyRow& row);

  // For each of up to `batch_rows` rows of n keys: bit i of masks[r] is set if key i is among the k[r] largest,
  // the lower index first among equals; 0 <= k[r] <= n, masks of padded(n) bits. Rows of one call are searched
  // side by side: a search alone waits for its own comparisons most of the time.
  void (*top_masks)(const KeyRow* rows, int64_t n, int64_t count, const int64_t* k, uint64_t* const* masks);

  // Sets those zero bits whose ranks among the zero bits are ranks[0] < ranks[1] < ...
  void (*set_ranked_zeros)(uint64_t* mask, const int32_t* ranks, int64_t count);

  // Writes base + i for every set bit i of n, ascending.
  void (*list_bits)(const uint64_t* mask, int64_t n, int64_t base, int64_t* out);

  // One frame of hidden states, read once: 1 / sqrt(mean square + eps) of every row, and the mean row.
  // `sums` is scratch of padded(columns).
  void (*pool_frame)(const void* hidden, DType dtype, const FrameShape& shape, float eps, float* rrms, float* mean,
                     float* sums);

  const AttentionLoops* attention;
  const CombinationLoops* combinations;
  const NoiseLoops* noise;
  const PolicyLoops* policy;
  const RowLoops* rows;
};

const HotLoops& hot_loops();  // the best variant this CPU runs

extern const HotLoops baseline_loops;
#if defined(__x86_64__)
extern const HotLoops avx2_loops;
extern const HotLoops avx512_loops;
#endif

}  // namespace cacovid::cpu
