// float to storage bits, to nearest even; NaN becomes the quiet NaN. Branch-free, so that loops vectorise.
#pragma once

#include "cacovid/dtype.h"

namespace cacovid {

CACOVID_HD void store_float(float* to, float x) { *to = x; }
CACOVID_HD void store_float(bf16_t* to, float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
CACOVID_HD void store_float(f16_t* to, float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = magnitude > 0x7f800000u ? 0u : (bits >> 16) & 0x8000u;
  // Normal results: round off 13 bits; the carry reaches infinity by itself. Subnormal ones: adding 0.5 lets
  // the adder round to the spacing 2^-24.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  to->bits = static_cast<uint16_t>(sign | (magnitude < 0x477ff000u ? finite : special));
}

}  // namespace cacovid
