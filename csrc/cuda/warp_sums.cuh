// Sums over the lanes of a warp, in one order: every lane gets the same bits.
#pragma once

#include "launch.cuh"

namespace cacovid::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

// Over neighbouring `lanes`, a power of two.
template <class T>
__device__ __forceinline__ T warp_sum(T x, int lanes = warp_lanes) {
  for (int apart = lanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(all_lanes, x, apart);
  return x;
}

// The sum of this lane and those before it.
template <class T>
__device__ __forceinline__ T running_sum(T x, int lane) {
  for (int apart = 1; apart < warp_lanes; apart *= 2) {
    const T before = __shfl_up_sync(all_lanes, x, apart);
    x += lane >= apart ? before : T{};
  }
  return x;
}

}  // namespace cacovid::cuda
