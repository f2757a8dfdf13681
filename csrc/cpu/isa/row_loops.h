// Loops over rows of memory: what gather and repack spend their time in. Compiled once per instruction set
// from row_loops.inl; every variant returns the same bits.
#pragma once

#include <cstdint>

#include "cacovid/dtype.h"

namespace cacovid::cpu {

// Rows of `bytes` bytes, `source_step` and `target_step` bytes apart. A target row is never followed by a
// source row that it overlaps, unless both are the same row.
struct RowCopy {
  char* target;
  const char* source;
  int64_t target_step, source_step, bytes;
  int64_t source_rows;  // an index outside [0, source_rows) reads nothing and gives zeros
  bool stream;          // store past the caches: for results that no cache would hold
};

struct RowLoops {
  // target[i] = source[index[i]] for i in [0, count).
  void (*copy_rows)(const RowCopy& rows, const int64_t* index, int64_t count);

  // The same for rows of `columns` floats, of which column j < half and column j + half are a pair that is
  // rotated by the angle with cos[i * half + j] and sin[i * half + j]: each product and each sum in float32
  // (float64 for f64), rounded once to the storage. Other columns are copied.
  void (*rotate_rows)(const RowCopy& rows, DType dtype, int64_t columns, int64_t half, const float* cos,
                      const float* sin, const int64_t* index, int64_t count);

  // target[j] = sum over p in positions[0 .. count), in that order and from +0, of rows[p][j], in float32
  // (float64 for f64), rounded once. Rows of `columns` floats lie one after another.
  void (*sum_rows)(const void* rows, DType dtype, int64_t columns, const int64_t* positions, int64_t count,
                   void* target);
};

const RowLoops& row_loops();  // the best variant this CPU runs

}  // namespace cacovid::cpu
