// Division by a number that many threads divide by: one multiplication and one shift in place of some twenty
// instructions (Granlund and Montgomery, Division by Invariant Integers using Multiplication, PLDI 1994).
#pragma once

#include <cstdint>

#include "cacovid/host_device.h"

namespace cacovid {

// Quotients and remainders of numbers below 2^31.
struct Divisor {
  uint32_t by;
  uint32_t multiplier;  // 2^shift / by, rounded up
  int32_t shift;        // 31 + log2(by), rounded up: the error stays below 1 / by

  CACOVID_HD uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
  CACOVID_HD uint32_t remainder(uint32_t n, uint32_t quotient) const { return n - quotient * by; }
};

// `by` in [1, 2^31).
inline Divisor divisor(int64_t by) {
  int32_t shift = 31;
  while ((int64_t{1} << (shift - 31)) < by) ++shift;
  const uint64_t whole = uint64_t{1} << shift;
  return {static_cast<uint32_t>(by), static_cast<uint32_t>((whole + by - 1) / by), shift};
}

}  // namespace cacovid
