// Total order of scores: finite by value, -0 equal to +0, then -inf, then NaN; ties to the lower index.
#pragma once

#include "cacovid/dtype.h"

namespace cacovid {

constexpr uint32_t key_nan = 0;
constexpr uint32_t key_neginf = 0x007fffffu;
constexpr uint32_t key_posinf = 0xff800000u;

// Larger key = ranked earlier. Monotone in the score; every NaN maps to 0. `bits` of a float, or of a narrower format
// moved to the front, in which infinity has the bits `infinity`.
CACOVID_HD uint32_t order_key_of(uint32_t bits, uint32_t infinity) {
  bits = bits == 0x80000000u ? 0 : bits;  // -0 = +0; not by adding, which may flush subnormal scores to zero
  const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;
  return (bits & 0x7fffffffu) > infinity ? key_nan : bits ^ flip;
}
CACOVID_HD uint32_t order_key(float x) { return order_key_of(float_to_bits(x), 0x7f800000u); }

// A score with this key.
CACOVID_HD float score_of(uint32_t key) { return bits_to_float(key >> 31 ? key ^ 0x80000000u : ~key); }

// The score that an order key stands for (+0 for both zeros, NaN for NaN).
CACOVID_HD float key_score(uint32_t key) { return bits_to_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// One integer per candidate: comparing them compares (key, lower index first).
CACOVID_HD uint64_t rank_word(uint32_t key, uint32_t index) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~index);
}
CACOVID_HD uint32_t rank_index(uint64_t word) { return ~static_cast<uint32_t>(word); }

}  // namespace cacovid
