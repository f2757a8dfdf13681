// Included by hot_loops.inl: copies and sums of rows.
#pragma once

#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cacovid/round.h"
#include "isa/row_loops.h"

namespace cacovid::cpu {
namespace {

constexpr int64_t line = 64;

template <bool stream>
inline __attribute__((always_inline)) void copy_line(char* target, const char* source) {
#if defined(__AVX512F__)
  const __m512i x = _mm512_loadu_si512(source);
  stream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(target), x) : _mm512_storeu_si512(target, x);
#elif defined(__AVX2__)
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source) + i);
    __m256i* to = reinterpret_cast<__m256i*>(target) + i;
    stream ? _mm256_stream_si256(to, x) : _mm256_storeu_si256(to, x);
  }
#elif defined(__SSE2__)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source) + i);
    __m128i* to = reinterpret_cast<__m128i*>(target) + i;
    stream ? _mm_stream_si128(to, x) : _mm_storeu_si128(to, x);
  }
#else
  std::memcpy(target, source, line);
#endif
}

constexpr char zero_line[line] = {};

// `next`: the row whose lines are fetched meanwhile. Rows lie too far apart, and at gaps too irregular, for
// the hardware to fetch them by itself.
template <bool stream>
inline void copy_row(char* target, const char* source, int64_t bytes, const char* next) {
  int64_t at = 0;
  for (; at + line <= bytes; at += line) {
    __builtin_prefetch(next + at);
    copy_line<stream>(target + at, source + at);
  }
  if (at < bytes) {
    __builtin_prefetch(next + at);
    if (bytes < line) {
      std::memcpy(target, source, static_cast<size_t>(bytes));
    } else {
      copy_line<false>(target + bytes - line, source + bytes - line);
    }
  }
}

// How many rows ahead to fetch: with less than 4 KiB on their way a core waits, above 16 KiB they get lost.
inline int64_t lookahead(int64_t row_bytes) {
  const int64_t rows = 8192 / row_bytes;
  return rows < 1 ? 1 : rows > 32 ? 32 : rows;
}

inline void fetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += line) __builtin_prefetch(row + at);
}

template <bool stream>
void copy_long_rows(const RowCopy& rows, const int64_t* index, int64_t count) {
  const int64_t ahead = lookahead(rows.bytes);
  const uint64_t limit = static_cast<uint64_t>(rows.source_rows);
  for (int64_t i = 0; i < ahead && i < count; ++i) {
    const bool inside = static_cast<uint64_t>(index[i]) < limit;
    if (inside) fetch_row(rows.source + index[i] * rows.source_step, rows.bytes);
  }
  for (int64_t i = 0; i < count; ++i) {
    char* target = rows.target + i * rows.target_step;
    const int64_t later = index[i + ahead < count ? i + ahead : count - 1];
    if (static_cast<uint64_t>(index[i]) >= limit) {
      int64_t at = 0;
      for (; at + line <= rows.bytes; at += line) copy_line<stream>(target + at, zero_line);
      std::memset(target + at, 0, static_cast<size_t>(rows.bytes - at));
      continue;
    }
    const char* source = rows.source + index[i] * rows.source_step;
    const char* next = static_cast<uint64_t>(later) < limit ? rows.source + later * rows.source_step : source;
    if (target != source) copy_row<stream>(target, source, rows.bytes, next);
  }
}

// One element a row: position ids, masks, labels, and rows that are not contiguous.
template <class T>
void copy_elements(const RowCopy& rows, const int64_t* index, int64_t count) {
  const uint64_t limit = static_cast<uint64_t>(rows.source_rows);
  for (int64_t i = 0; i < count; ++i) {
    T x{};
    if (static_cast<uint64_t>(index[i]) < limit) std::memcpy(&x, rows.source + index[i] * rows.source_step, sizeof x);
    std::memcpy(rows.target + i * rows.target_step, &x, sizeof x);
  }
}

struct Pair {
  uint64_t low, high;
};

void copy_rows(const RowCopy& rows, const int64_t* index, int64_t count) {
  switch (rows.bytes) {
    case 1: return copy_elements<uint8_t>(rows, index, count);
    case 2: return copy_elements<uint16_t>(rows, index, count);
    case 4: return copy_elements<uint32_t>(rows, index, count);
    case 8: return copy_elements<uint64_t>(rows, index, count);
    case 16: return copy_elements<Pair>(rows, index, count);
    default: break;
  }
  // Streaming stores need whole, aligned lines.
  const bool aligned = (reinterpret_cast<uintptr_t>(rows.target) | rows.target_step | rows.bytes) % line == 0;
  if (!rows.stream || !aligned) return copy_long_rows<false>(rows, index, count);
  copy_long_rows<true>(rows, index, count);
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline double load_sum(double x) { return x; }
inline float load_sum(float x) { return x; }
inline float load_sum(bf16_t x) { return load_float(x); }
inline float load_sum(f16_t x) { return load_float(x); }
inline void store_sum(double* to, double x) { *to = x; }
template <class T>
inline void store_sum(T* to, float x) {
  store_float(to, x);
}

template <class T>
void sum_rows_as(const T* rows, int64_t columns, const int64_t* positions, int64_t count, T* target) {
  using Sum = decltype(load_sum(T{}));
  constexpr int64_t block = 512;
  Sum sums[block];
  for (int64_t first = 0; first < columns; first += block) {
    const int64_t n = columns - first < block ? columns - first : block;
    for (int64_t j = 0; j < n; ++j) sums[j] = 0;
    for (int64_t p = 0; p < count; ++p) {
      const T* row = rows + positions[p] * columns + first;
      for (int64_t j = 0; j < n; ++j) sums[j] += load_sum(row[j]);
    }
    for (int64_t j = 0; j < n; ++j) store_sum(target + first + j, sums[j]);
  }
}

template <class T>
void rotate_rows_as(const RowCopy& rows, int64_t columns, int64_t half, const float* cos, const float* sin,
                    const int64_t* index, int64_t count) {
  const uint64_t limit = static_cast<uint64_t>(rows.source_rows);
  const int64_t ahead = lookahead(rows.bytes);
  for (int64_t i = 0; i < count; ++i, cos += half, sin += half) {
    T* target = reinterpret_cast<T*>(rows.target + i * rows.target_step);
    if (static_cast<uint64_t>(index[i]) >= limit) {
      std::memset(target, 0, static_cast<size_t>(rows.bytes));
      continue;
    }
    const T* source = reinterpret_cast<const T*>(rows.source + index[i] * rows.source_step);
    const int64_t later = index[i + ahead < count ? i + ahead : count - 1];
    const char* next = static_cast<uint64_t>(later) < limit ? rows.source + later * rows.source_step : rows.source;
    fetch_row(next, rows.bytes);
    for (int64_t j = 0; j < half; ++j) {
      const auto a = load_sum(source[j]), b = load_sum(source[j + half]);
      store_sum(target + j, a * cos[j] - b * sin[j]);
      store_sum(target + j + half, b * cos[j] + a * sin[j]);
    }
    if (target != source) {
      std::memcpy(target + 2 * half, source + 2 * half, static_cast<size_t>(columns - 2 * half) * sizeof(T));
    }
  }
}

// Calls `as` with a value of the float type `dtype`.
template <class As>
void with_float_type(DType dtype, const As& as) {
  switch (dtype) {
    case DType::f64: return as(double{});
    case DType::bf16: return as(bf16_t{});
    case DType::f16: return as(f16_t{});
    default: return as(float{});
  }
}

void rotate_rows(const RowCopy& rows, DType dtype, int64_t columns, int64_t half, const float* cos, const float* sin,
                 const int64_t* index, int64_t count) {
  with_float_type(dtype,
                  [&](auto zero) { rotate_rows_as<decltype(zero)>(rows, columns, half, cos, sin, index, count); });
}

void sum_rows(const void* rows, DType dtype, int64_t columns, const int64_t* positions, int64_t count, void* target) {
  with_float_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    sum_rows_as(static_cast<const T*>(rows), columns, positions, count, static_cast<T*>(target));
  });
}

const RowLoops row_loop_table = {copy_rows, rotate_rows, sum_rows};

}  // namespace
}  // namespace cacovid::cpu
