// The hot loops of attention scores, compiled once per instruction set from attention_loops.inl. Every variant returns
// the same bits.
#pragma once

#include "isa/hot_loops.h"

namespace cacovid::cpu {

constexpr int64_t chunk = 16;  // columns and keys come in multiples of so many lanes
constexpr int64_t chunks(int64_t n) { return (n + chunk - 1) / chunk; }

// Keys of one head, one after another.
struct KeyRows {
  const void* data;
  DType dtype;
  int64_t count, columns, row_stride, column_stride;  // strides in elements
};

struct AttentionLoops {
  // products[r * step + j] = queries[r] . keys[j] for j < keys.count and `rows` queries of chunks(columns) * chunk
  // floats, zero behind the columns; step >= chunks(keys.count) * chunk, entries behind the last key are garbage.
  // `copies`: scratch of 4 rows like a query's. Sixteen running sums whatever the registers' width.
  void (*products)(const KeyRows& keys, const float* queries, int64_t rows, float* products, int64_t step,
                   float* copies);

  // Adds softmax(scale * products) of n >= 1 keys to totals[0 .. n). `seen` (null: all): of n words, 0 where a key
  // has no part in it; totals of those may become anything. The products are overwritten, up to chunks(n) * chunk.
  void (*add_softmax)(float* products, const uint32_t* seen, int64_t n, float scale, float* totals);
};

inline const AttentionLoops& attention_loops() { return *hot_loops().attention; }

}  // namespace cacovid::cpu
