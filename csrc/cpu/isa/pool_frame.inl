// Included by hot_loops.inl: statistics of one frame of hidden states in a single read.
//
// Four rows advance together, so that the column sums are loaded and stored once for every four rows.
// Sixteen lanes everywhere, whatever the registers' width: the order of every addition, hence every bit,
// is the same for all instruction sets.
#pragma once

#include <cmath>
#include <type_traits>

namespace cacovid::cpu {
namespace {

constexpr int lanes = 16;
#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif
constexpr int parts = lanes / width;  // registers that hold the sixteen lanes
constexpr int prefetch_bytes = 2048;  // the hardware's own prefetch stops at page ends, which rows of 7 KB cross
typedef float Floats __attribute__((vector_size(4 * width)));
typedef uint32_t Words __attribute__((vector_size(4 * width)));
typedef uint16_t Halves __attribute__((vector_size(2 * width)));

// `width` adjacent columns. Returned by reference: vector arguments have no common ABI.
template <class T>
inline __attribute__((always_inline)) void load_floats(const T* row, Floats& out) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(&out, row, sizeof out);
  } else {
    Halves halves;
    std::memcpy(&halves, row, sizeof halves);
    const Words bits = __builtin_convertvector(halves, Words);
    if constexpr (std::is_same_v<T, bf16_t>) {
      out = reinterpret_cast<Floats>(bits << 16);
    } else {  // as load_float(f16_t)
      const Words magnitude = (bits & 0x7fffu) << 13;
      const Words finite = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) * 5.192296858534828e33f);
      const Words special = magnitude | 0x7f800000u;
      out = reinterpret_cast<Floats>((bits & 0x8000u) << 16 | ((bits & 0x7c00u) == 0x7c00u ? special : finite));
    }
  }
}

// Sixteen columns of a few rows: their squares into the rows' lanes, their values into the column sums.
template <class T, int rows>
inline __attribute__((always_inline)) void pool_lanes(const T* const* row, int64_t column,
                                                      Floats (&squares)[rows][parts], float* sums) {
#pragma GCC unroll 4
  for (int p = 0; p < parts; ++p) {
    Floats x[rows], sum;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const T* from = row[r] + column + p * width;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + prefetch_bytes);
      load_floats(from, x[r]);
      squares[r][p] += x[r] * x[r];
    }
    std::memcpy(&sum, sums + p * width, sizeof sum);
    sum += rows == 4 ? (x[0] + x[1]) + (x[2] + x[3]) : x[0];
    std::memcpy(sums + p * width, &sum, sizeof sum);
  }
}

template <class T, int rows>
void pool_rows(const T* first, const FrameShape& shape, float eps, float* rrms, float* sums) {
  Floats squares[rows][parts] = {};
  const T* row[rows];
  int64_t column = 0;
  if (shape.column_stride == 1) {
    for (int r = 0; r < rows; ++r) row[r] = first + r * shape.row_stride;
    for (; column + lanes <= shape.columns; column += lanes) pool_lanes(row, column, squares, sums + column);
  }
  for (; column < shape.columns; column += lanes) {
    T gathered[rows][lanes] = {};  // columns past the end are zero and change no sum
    const int64_t count = shape.columns - column < lanes ? shape.columns - column : lanes;
    for (int r = 0; r < rows; ++r) {
      const T* from = first + r * shape.row_stride + column * shape.column_stride;
      for (int64_t c = 0; c < count; ++c) gathered[r][c] = from[c * shape.column_stride];
      row[r] = gathered[r];
    }
    pool_lanes(row, 0, squares, sums + column);
  }
  for (int r = 0; r < rows; ++r) {
    float lane[lanes], total = 0.0f;
    std::memcpy(lane, squares[r], sizeof lane);
    for (int l = 0; l < lanes; ++l) total += lane[l];
    rrms[r] = 1.0f / std::sqrt(total / static_cast<float>(shape.columns) + eps);
  }
}

template <class T>
void pool_frame_as(const T* hidden, const FrameShape& shape, float eps, float* rrms, float* mean, float* sums) {
  std::memset(sums, 0, static_cast<size_t>(padded(shape.columns)) * sizeof(float));
  int64_t r = 0;
  for (; r + 4 <= shape.rows; r += 4) pool_rows<T, 4>(hidden + r * shape.row_stride, shape, eps, rrms + r, sums);
  for (; r < shape.rows; ++r) pool_rows<T, 1>(hidden + r * shape.row_stride, shape, eps, rrms + r, sums);
  for (int64_t c = 0; c < shape.columns; ++c) mean[c] = sums[c] / static_cast<float>(shape.rows);
}

void pool_frame(const void* hidden, DType dtype, const FrameShape& shape, float eps, float* rrms, float* mean,
                float* sums) {
  switch (dtype) {
    case DType::bf16: return pool_frame_as(static_cast<const bf16_t*>(hidden), shape, eps, rrms, mean, sums);
    case DType::f16: return pool_frame_as(static_cast<const f16_t*>(hidden), shape, eps, rrms, mean, sums);
    default: return pool_frame_as(static_cast<const float*>(hidden), shape, eps, rrms, mean, sums);
  }
}

}  // namespace
}  // namespace cacovid::cpu
