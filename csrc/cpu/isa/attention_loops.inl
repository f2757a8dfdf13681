// Included by hot_loops.inl: products of queries and keys, and the softmax of one row.
//
// Products of two 16-bit floats are exact in float32, so that adding them fused or not gives the same bits; those of
// float32 are rounded before they are added on every instruction set.
#pragma once

#include <type_traits>

#include "isa/attention_loops.h"
#include "isa/pool_frame.inl"
#include "isa/row_loops.inl"

namespace cacovid::cpu {
namespace {

constexpr int tile_keys = 4;
#if defined(__AVX512F__)
constexpr int tile_rows = 4;  // sixteen sums in registers
#else
constexpr int tile_rows = 2;
#endif
typedef float Four __attribute__((vector_size(16)));

template <class T>
inline __attribute__((always_inline)) void add_product(Floats& sum, const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<T, float>) {
    sum = reinterpret_cast<Floats>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
    return;
  }
#elif defined(__FMA__)
  if constexpr (!std::is_same_v<T, float>) {
    sum = reinterpret_cast<Floats>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
    return;
  }
#endif
  sum += a * b;
}

// Sums of four times sixteen lanes: lane l joins l + 8, then l + 4, l + 2 and l + 1.
inline __attribute__((always_inline)) void add_lanes(const float (*lane)[chunk], float* out) {
  Four x[tile_keys];
  for (int k = 0; k < tile_keys; ++k) {
    Four part[4];
    std::memcpy(part, lane[k], sizeof part);
    x[k] = (part[0] + part[2]) + (part[1] + part[3]);
  }
#if defined(__SSE2__)
  __m128 a = reinterpret_cast<__m128>(x[0]), b = reinterpret_cast<__m128>(x[1]);
  __m128 c = reinterpret_cast<__m128>(x[2]), d = reinterpret_cast<__m128>(x[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
#else
  for (int k = 0; k < tile_keys; ++k) out[k] = (x[k][0] + x[k][2]) + (x[k][1] + x[k][3]);
#endif
}

// Four keys times a few queries. One part of the sixteen lanes after the other: its sums stay in registers.
template <class T, int rows>
inline void multiply_tile(const T* const* key, int64_t columns, const float* queries, float* products, int64_t step) {
  alignas(64) float lane[rows][tile_keys][chunk];
  for (int p = 0; p < parts; ++p) {
    Floats sums[rows][tile_keys] = {};
    for (int64_t c = p * width; c < columns; c += chunk) {
      Floats x[tile_keys];
#pragma GCC unroll 4
      for (int k = 0; k < tile_keys; ++k) load_floats(key[k] + c, x[k]);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        Floats q;
        std::memcpy(&q, queries + r * columns + c, sizeof q);
#pragma GCC unroll 4
        for (int k = 0; k < tile_keys; ++k) add_product<T>(sums[r][k], x[k], q);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int k = 0; k < tile_keys; ++k) std::memcpy(&lane[r][k][p * width], &sums[r][k], sizeof(Floats));
    }
  }
  for (int r = 0; r < rows; ++r) add_lanes(lane[r], products + r * step);
}

template <class T>
inline void multiply_rows(const T* const* key, int64_t columns, const float* queries, int64_t rows, float* products,
                          int64_t step) {
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows) {
    multiply_tile<T, tile_rows>(key, columns, queries + r * columns, products + r * step, step);
  }
  switch (rows - r) {
    case 3: return multiply_tile<T, 3>(key, columns, queries + r * columns, products + r * step, step);
    case 2: return multiply_tile<T, 2>(key, columns, queries + r * columns, products + r * step, step);
    case 1: return multiply_tile<T, 1>(key, columns, queries + r * columns, products + r * step, step);
    default: return;
  }
}

template <class T>
void products_as(const KeyRows& keys, const float* queries, int64_t rows, float* products, int64_t step,
                 float* copies) {
  const T* data = static_cast<const T*>(keys.data);
  const int64_t columns = chunks(keys.columns) * chunk;
  const bool whole = keys.column_stride == 1 && keys.columns == columns;
  for (int64_t j = 0; j < keys.count; j += tile_keys) {
    const T* key[tile_keys];
    for (int64_t k = 0; k < tile_keys; ++k) {
      const int64_t row = j + k < keys.count ? j + k : keys.count - 1;
      key[k] = data + row * keys.row_stride;
      if (whole) {
        const int64_t ahead = prefetch_bytes / static_cast<int64_t>(sizeof(T)) / columns / tile_keys * tile_keys;
        const char* next = reinterpret_cast<const char*>(data + (row + ahead + tile_keys) * keys.row_stride);
        for (int64_t at = 0; at < columns * static_cast<int64_t>(sizeof(T)); at += line) __builtin_prefetch(next + at);
        continue;
      }
      T* copy = reinterpret_cast<T*>(copies + k * columns);
      for (int64_t c = 0; c < columns; ++c) copy[c] = c < keys.columns ? key[k][c * keys.column_stride] : T{};
      key[k] = copy;
    }
    multiply_rows<T>(key, columns, queries, rows, products + j, step);
  }
}

void products(const KeyRows& keys, const float* queries, int64_t rows, float* out, int64_t step, float* copies) {
  switch (keys.dtype) {
    case DType::bf16: return products_as<bf16_t>(keys, queries, rows, out, step, copies);
    case DType::f16: return products_as<f16_t>(keys, queries, rows, out, step, copies);
    default: return products_as<float>(keys, queries, rows, out, step, copies);
  }
}

// e^x for x <= 0, 0 below -87, NaN for NaN; relative error 2e-7.
inline __attribute__((always_inline)) void exp_lanes(Floats& x) {
  const Floats low = Floats{} - 87.0f;
  const Floats y = x > low ? x : low;
  const Floats shifted = y * 1.44269504f + 12582912.0f;  // the low bits hold the exponent
  const Floats n = shifted - 12582912.0f;
  const Floats r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const Words scale = (reinterpret_cast<Words>(shifted) + 127u) << 23;
  const Floats small = x == x ? Floats{} : x;
  x = x > low ? p * reinterpret_cast<Floats>(scale) : small;
}

float sum_of(const Floats (&sums)[parts]) {
  float lane[chunk];
  std::memcpy(lane, sums, sizeof lane);
  for (int64_t half = chunk / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

void add_softmax(float* x, const uint32_t* seen, int64_t n, float scale, float* totals) {
  const int64_t end = chunks(n) * chunk;
  const float infinity = __builtin_inff();
  Floats best[parts];
  for (Floats& b : best) b = Floats{} - infinity;
  for (int64_t j = n; j < end; ++j) x[j] = 0.0f;
  for (int64_t j = 0; j < end; j += chunk) {
    uint32_t tail[chunk] = {};
    const uint32_t* words = seen == nullptr ? nullptr : seen + j;
    if (j + chunk > n) {
      for (int64_t l = 0; l < n - j; ++l) tail[l] = words == nullptr ? ~0u : words[l];
      words = tail;
    }
    for (int p = 0; p < parts; ++p) {
      Floats logit;
      std::memcpy(&logit, x + j + p * width, sizeof logit);
      logit *= scale;
      if (words != nullptr) {
        Words visible;
        std::memcpy(&visible, words + p * width, sizeof visible);
        logit = visible != 0 ? logit : Floats{} - infinity;
      }
      best[p] = logit > best[p] ? logit : best[p];
      std::memcpy(x + j + p * width, &logit, sizeof logit);
    }
  }
  float lane[chunk], top = -infinity;
  std::memcpy(lane, best, sizeof lane);
  for (const float b : lane) top = b > top ? b : top;
  double total = 0.0;
  constexpr int64_t block = 128 * chunk;  // so many at most are added up in float32
  for (int64_t first = 0; first < end; first += block) {
    Floats sums[parts] = {};
    for (int64_t j = first; j < end && j < first + block; j += chunk) {
      for (int p = 0; p < parts; ++p) {
        Floats e;
        std::memcpy(&e, x + j + p * width, sizeof e);
        e -= top;
        exp_lanes(e);
        sums[p] += e;
        std::memcpy(x + j + p * width, &e, sizeof e);
      }
    }
    total += static_cast<double>(sum_of(sums));
  }
  const float share = static_cast<float>(1.0 / total);
  for (int64_t j = 0; j < n; ++j) totals[j] += x[j] * share;
}

constexpr AttentionLoops attention_loop_table = {products, add_softmax};

}  // namespace
}  // namespace cacovid::cpu
