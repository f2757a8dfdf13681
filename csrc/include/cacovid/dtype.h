// Element types of the tensors that cross the core's boundary.
#pragma once

#include <cstdint>
#include <cstring>

#include "cacovid/host_device.h"

namespace cacovid {

enum class DType : int32_t { f32, f16, bf16, f64, i64, i32, i16, i8, u8, b8 };

CACOVID_HD constexpr int64_t item_size(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::f16:
    case DType::bf16:
    case DType::i16: return 2;
    default: return 1;
  }
}

CACOVID_HD constexpr bool is_floating(DType t) {
  return t == DType::f32 || t == DType::f16 || t == DType::bf16 || t == DType::f64;
}

// Storage bits to float, exact for every input. Branch-free, so that loops over them vectorise.
CACOVID_HD float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
CACOVID_HD uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
CACOVID_HD float load_float(float x) { return x; }
struct bf16_t {
  uint16_t bits;
};
CACOVID_HD float load_float(bf16_t x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
struct f16_t {
  uint16_t bits;
};
CACOVID_HD float load_float(f16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Shift the exponent from bias 15 to 127. A subnormal joins 2^-14 and leaves it again: no operand is subnormal
  // as a float, so that a thread which flushes those to zero reads the same.
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude + 0x38800000u) - 6.103515625e-05f);
  const uint32_t special = magnitude | 0x7f800000u;  // inf and NaN
  const uint32_t finite = magnitude < 0x00800000u ? subnormal : normal;
  return bits_to_float(sign | (magnitude < 0x0f800000u ? finite : special));
}

}  // namespace cacovid
