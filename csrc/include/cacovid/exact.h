// Arithmetic with one answer everywhere: float64 from add, multiply, divide and bit casts, sums in
// 64-bit fixed point. Compilers must not contract (a * b + c) here: the build passes
// -ffp-contract=off, CUDA sources are compiled with -fmad=false.
#pragma once

#include <cstdint>
#include <cstring>

#include "cacovid/host_device.h"

namespace cacovid {

// Round to the nearest integer, ties to even, for |x| < 2^51.
constexpr double rounding_shift = 6755399441055744.0;  // 1.5 * 2^52
CACOVID_HD double round_even(double x) { return (x + rounding_shift) - rounding_shift; }

// The same as an integer. The shifted sum holds it in its low bits; converting instead would keep loops from
// vectorising where the instruction set has no such conversion.
CACOVID_HD int64_t round_even_bits(double x) {
  const double shifted = x + rounding_shift;
  int64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4338000000000000;
}

// Fixed point with 40 fractional bits: integer sums have the same bits in every order.
CACOVID_HD int64_t to_fixed(double x) { return round_even_bits(x * 1099511627776.0); }
CACOVID_HD double from_fixed(int64_t x) { return static_cast<double>(x) * 9.094947017729282379150390625e-13; }

// e^x for x <= 0, relative error below 4e-16; 0 below -700.
CACOVID_HD double exp_exact(double x) {
  const bool tiny = !(x >= -700.0);
  x = tiny ? 0.0 : x;
  const double n = round_even(x * 1.4426950408889634);
  double r = x - n * 0.693147180369123816490;  // ln 2, leading 32 bits: the product is exact
  r = r - n * 1.90821492927058770002e-10;
  double p = 1.6059043836821613e-10;  // Taylor coefficients 1/13! ... 1/0!
  p = p * r + 2.08767569878681e-09;
  p = p * r + 2.505210838544172e-08;
  p = p * r + 2.755731922398589e-07;
  p = p * r + 2.7557319223985893e-06;
  p = p * r + 2.48015873015873e-05;
  p = p * r + 1.984126984126984e-04;
  p = p * r + 1.3888888888888889e-03;
  p = p * r + 8.333333333333333e-03;
  p = p * r + 4.1666666666666664e-02;
  p = p * r + 1.6666666666666666e-01;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const int64_t bits = (round_even_bits(n) + 1023) << 52;
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return tiny ? 0.0 : p * scale;
}

}  // namespace cacovid
