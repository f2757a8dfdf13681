// Quotient and remainder of numbers that nearly always fit 32 bits, where GPUs divide several times faster.
#pragma once

#include <cstdint>

#include "cacovid/host_device.h"

namespace cacovid {

struct Division {
  int64_t quotient, remainder;
};

// n >= 0, by > 0.
CACOVID_HD Division divide(int64_t n, int64_t by) {
  if ((static_cast<uint64_t>(n | by) >> 32) == 0) {
    const uint32_t a = static_cast<uint32_t>(n), b = static_cast<uint32_t>(by), quotient = a / b;
    return {quotient, a - quotient * b};
  }
  const int64_t quotient = n / by;
  return {quotient, n - quotient * by};
}

}  // namespace cacovid
