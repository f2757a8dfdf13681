// The library's randomness, part two: 32 random bits to standard Gumbel noise with one answer everywhere.
//
// g = -ln(E), E = -ln(1 - v), v = (r + 0.5) / 2^32. Small v are the large noises, the ones that win, and
// there 1 - v would lose their low bits, so ln(1 - v) is computed from v itself (the log1p form).
// Only IEEE float32 add, multiply, fused multiply-add and bit casts are used. Over all 2^32 inputs
// (csrc/tests/test_gumbel.cpp): finite, never rising, in [-2.8116, 22.8739], absolute error against the exact
// noise of v as float32 at most 1.02e-6, of which rounding the result to float32 takes 0.95e-6. Rounding v itself
// shifts the smallest noises, those that lose: by up to 0.025 near r = 2^32, and 0.32 in the last 256.
#pragma once

#include "cacovid/dtype.h"
#include "cacovid/exact.h"
#include "cacovid/order.h"

namespace cacovid {

// a * b + c rounded once, without relying on hardware: the sum is rounded to odd in float64, which leaves
// the final rounding to float32 nothing to get wrong. (An exact sum needs no care; otherwise the last bit
// is set to say "not exact".)
CACOVID_HD float fma_emulated(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);  // 48 bits: exact
  const double addend = static_cast<double>(c);
  double sum = product + addend;
  const double virtual_addend = sum - product;
  const double error = (product - (sum - virtual_addend)) + (addend - virtual_addend);
  int64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  if (error != 0.0 && (bits & 1) == 0) bits += (error > 0.0) == (sum > 0.0) ? 1 : -1;
  memcpy(&sum, &bits, sizeof sum);
  return static_cast<float>(sum);
}

CACOVID_HD float fma_exact(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return fma_emulated(a, b, c);
#endif
}

// ln(1 + f) for f in [-1/3, 1/3]: f - f^2/2 + f^3 q(f). The coefficients of q minimise the largest relative
// error, 3.7e-8 before rounding, each rounded to float32 and the higher ones fitted again.
CACOVID_HD float ln_1p_core(float f) {
  float p = 0.13820920884609222f;
  p = fma_exact(p, f, -0.15122200548648834f);
  p = fma_exact(p, f, 0.140421524643898f);
  p = fma_exact(p, f, -0.1647232323884964f);
  p = fma_exact(p, f, 0.2000793069601059f);
  p = fma_exact(p, f, -0.2500423789024353f);
  p = fma_exact(p, f, 0.3333326578140259f);
  p = fma_exact(p, f, -0.5f);
  return fma_exact(p, f * f, f);
}

// x = mantissa * 2^exponent with the mantissa in [2/3, 4/3), for a positive normal x.
CACOVID_HD int32_t split_exponent(float x, float* mantissa) {
  const uint32_t bits = float_to_bits(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F2AAAABu) >> 23;
  *mantissa = bits_to_float(bits - (static_cast<uint32_t>(exponent) << 23));
  return exponent;
}

// ln(x) for a positive normal x, relative error below 1.3e-7 (largest at 1.3336).
CACOVID_HD float ln_float(float x) {
  float mantissa;
  const int32_t exponent = split_exponent(x, &mantissa);
  return fma_exact(static_cast<float>(exponent), 0.69314718056f, ln_1p_core(mantissa - 1.0f));
}

// e^x for x <= 0, relative error below 1e-7; 0 below -87 and for NaN. x = n ln 2 + r, e^r = 1 + r + r^2 q(r).
CACOVID_HD float exp_float(float x) {
  const bool tiny = !(x >= -87.0f);
  x = tiny ? 0.0f : x;
  const float shifted = fma_exact(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: n is in the low bits
  const float n = shifted - 12582912.0f;
  float r = fma_exact(n, -0.693115234375f, x);  // ln 2, leading 12 bits: the product is exact
  r = fma_exact(n, -3.194618329871446e-05f, r);
  float q = 0.001382146612741053f;
  q = fma_exact(q, r, 0.008368662558495998f);
  q = fma_exact(q, r, 0.041668254882097244f);
  q = fma_exact(q, r, 0.1666652113199234f);
  q = fma_exact(q, r, 0.4999999403953552f);
  const float p = fma_exact(q, r * r, r) + 1.0f;
  const float scaled = bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
  return tiny ? 0.0f : scaled;
}

// Standard Gumbel noise of 32 random bits; falls as the bits rise.
CACOVID_HD float gumbel_noise(uint32_t bits) {
  bits = bits < 0xFFFFFEFFu ? bits : 0xFFFFFEFFu;  // the last 256 would round v to 1
  const float v = (static_cast<float>(bits) + 0.5f) * 2.3283064365386963e-10f;
  float mantissa;
  const int32_t exponent = split_exponent(1.0f - v, &mantissa);
  const float f = exponent == 0 ? -v : mantissa - 1.0f;
  return -ln_float(-fma_exact(static_cast<float>(exponent), 0.69314718056f, ln_1p_core(f)));
}

// Order key of a score plus noise; 0 where the probability is zero. The sum is neither NaN nor -0, which order_key
// would look after.
CACOVID_HD uint32_t perturbed_key(uint32_t key, uint32_t bits) {
  const uint32_t sum = float_to_bits(key_score(key) + gumbel_noise(bits));
  const uint32_t perturbed = sum ^ (static_cast<uint32_t>(static_cast<int32_t>(sum) >> 31) | 0x80000000u);
  return key > key_neginf ? perturbed : 0;
}

}  // namespace cacovid
