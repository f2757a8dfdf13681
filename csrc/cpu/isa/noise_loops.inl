// Philox and Gumbel noise for many elements, and the sums that log-probabilities need.
#pragma once

#include "cacovid/gumbel.h"
#include "cacovid/order.h"
#include "cacovid/philox.h"
#include "isa/noise_loops.h"

namespace cacovid::cpu {
namespace {

// Philox multiplies 32 by 32 bits into 64. In lanes of 64 bits, of which the products read the low half only,
// that is one instruction and the other halves may hold anything.
#if defined(__AVX512F__)
constexpr int wide_lanes = 8;
#elif defined(__AVX2__)
constexpr int wide_lanes = 4;
#else
constexpr int wide_lanes = 2;
#endif
typedef uint64_t Wide __attribute__((vector_size(8 * wide_lanes)));
typedef uint32_t Narrow __attribute__((vector_size(4 * wide_lanes)));

inline __attribute__((always_inline)) Wide multiply_low(Wide a, Wide b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

constexpr int noise_block = 16;

// random_bits of `noise_block` elements of a row. Inlined, so that a loop computes what the row alone decides once.
inline __attribute__((always_inline)) void random_block(const uint32_t* columns, const uint32_t* stream_samples,
                                                        const NoiseRow& row, uint32_t* bits) {
  constexpr int parts = noise_block / wide_lanes;
  Wide c0[parts], c1[parts], c2[parts], c3[parts];
  for (int p = 0; p < parts; ++p) {
    Narrow column, stream_sample;
    std::memcpy(&column, columns + p * wide_lanes, sizeof column);
    std::memcpy(&stream_sample, stream_samples + p * wide_lanes, sizeof stream_sample);
    c0[p] = __builtin_convertvector(column, Wide);
    c1[p] = Wide{} + row.row;
    c2[p] = Wide{} + row.step;
    c3[p] = __builtin_convertvector(stream_sample, Wide);
  }
  const Wide multiplier0 = Wide{} + philox_multiplier_0, multiplier1 = Wide{} + philox_multiplier_1;
  uint32_t key0 = static_cast<uint32_t>(row.seed), key1 = static_cast<uint32_t>(row.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int p = 0; p < parts; ++p) {
      const Wide product0 = multiply_low(c0[p], multiplier0), product1 = multiply_low(c2[p], multiplier1);
      c0[p] = (product1 >> 32) ^ c1[p] ^ key0;
      c1[p] = product1;
      c2[p] = (product0 >> 32) ^ c3[p] ^ key1;
      c3[p] = product0;
    }
    key0 += philox_key_step_0;
    key1 += philox_key_step_1;
  }
  for (int p = 0; p < parts; ++p) {
    const Narrow word = __builtin_convertvector(c0[p], Narrow);
    std::memcpy(bits + p * wide_lanes, &word, sizeof word);
  }
}

void gumbel(const uint32_t* bits, int64_t n, float* noise) {
  for (int64_t i = 0; i < n; ++i) noise[i] = gumbel_noise(bits[i]);
}

void perturb(const uint32_t* keys, const uint32_t* columns, int64_t n, const NoiseRow& row, uint32_t stream_sample,
             KeyRow& out) {
  uint32_t stream_samples[noise_block], bits[key_block];
  for (int l = 0; l < noise_block; ++l) stream_samples[l] = stream_sample;
  for (int64_t i = 0; i < n; i += key_block) {
    for (int b = 0; b < key_block; b += noise_block) random_block(columns + i + b, stream_samples, row, bits + b);
    for (int l = 0; l < key_block; ++l) out.keys[i + l] = perturbed_key(keys[i + l], bits[l]);
  }
  uint32_t smallest = 0xffffffffu, largest = 0;  // in a loop of its own: together they do not vectorise
  for (int64_t i = 0; i < n; ++i) {
    smallest = out.keys[i] < smallest ? out.keys[i] : smallest;
    largest = out.keys[i] > largest ? out.keys[i] : largest;
  }
  out.smallest = smallest;
  out.largest = largest;
}

void exp_below(const double* x, int64_t n, double top, double* e) {
  for (int64_t i = 0; i < n; ++i) e[i] = exp_exact(x[i] - top);
}

void log_weights(const float* weights, int64_t n, float* logs) {
  for (int64_t i = 0; i < n; ++i) {
    const float log = ln_float(weights[i] > 0.0f ? weights[i] : 1.0f);
    logs[i] = weights[i] > 0.0f ? log : -__builtin_inff();
  }
}

// Sixteen running sums whatever the registers' width: one order of additions, hence the same bits.
double sum(const double* x, int64_t n) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int l = 0; l < 16; ++l) lanes[l] += x[i + l];
  }
  for (; i < n; ++i) lanes[i % 16] += x[i];
  for (int width = 8; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

constexpr NoiseLoops noise_loop_table = {gumbel, perturb, exp_below, log_weights, sum};

}  // namespace
}  // namespace cacovid::cpu
