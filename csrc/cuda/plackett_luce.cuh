// The probability of an ordered draw, by a block.
#pragma once

#include <cmath>

#include "cacovid/exact.h"
#include "warp_sums.cuh"

namespace cacovid::cuda {

// e^logit of any range: total * 16^exponent. A logit costs one exponential and a sum none; no sum overflows.
struct Weight {
  double total = 0.0, exponent = -1.7976931348623157e308;  // nothing

  Weight() = default;
  __device__ Weight(double total, double exponent) : total(total), exponent(exponent) {}

  // Of a finite logit. Above 2^50 a logit has no digits for the rest.
  __device__ static Weight of(float logit) {
    const double x = static_cast<double>(logit), exponent = ceil(x * 0.36067376022224085);
    const double rest = x - exponent * 2.772588722239781;
    return {exp_exact(rest <= 0.0 && rest > -4.0 ? rest : 0.0), exponent};
  }
};

// 16^exponent for exponents <= 0, 2^-1020 for all that are less.
__device__ __forceinline__ double power_of_16(double exponent) {
  const int64_t bits = (1023 + 4 * static_cast<int64_t>(exponent > -255.0 ? exponent : -255.0)) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

__device__ __forceinline__ Weight operator+(const Weight& a, const Weight& b) {
  const double exponent = a.exponent > b.exponent ? a.exponent : b.exponent;
  return {a.total * power_of_16(a.exponent - exponent) + b.total * power_of_16(b.exponent - exponent), exponent};
}

// ln of a part of a weight.
__device__ __forceinline__ double log_share(const Weight& part, const Weight& whole) {
  return log(part.total / whole.total) + (part.exponent - whole.exponent) * 2.772588722239781;
}

__device__ __forceinline__ Weight warp_total(Weight w) {
  for (int apart = warp_lanes / 2; apart > 0; apart /= 2) {
    w = w + Weight(__shfl_xor_sync(all_lanes, w.total, apart), __shfl_xor_sync(all_lanes, w.exponent, apart));
  }
  return w;
}

// What every warp tells the others.
struct WarpReport {
  Weight undrawn, drawn;
  double log_prob;
};

// ln of the probability that a race is won by `count` items in their order; logit_of(j) is that of the j-th, `undrawn`
// the weight of those items that the thread knows not to be among them. Every thread of the block has to call it; the
// first gets the result. Items at +inf win for sure, the others run without them. `reports`: one for every warp.
//
// Warps take consecutive winners and go from the last to the first: the race only gains weight, nothing is subtracted.
template <class LogitOf>
__device__ double log_prob_of_winners(int64_t count, const LogitOf& logit_of, Weight undrawn, WarpReport* reports) {
  const int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes, warps = blockDim.x / warp_lanes;
  const int64_t share = (count + blockDim.x - 1) / blockDim.x * warp_lanes;
  const int64_t begin = warp * share < count ? warp * share : count;
  const int64_t end = begin + share < count ? begin + share : count;
  const auto weight_of = [&](int64_t j) {
    const float logit = j >= begin && j < end ? logit_of(j) : INFINITY;
    return logit < INFINITY ? Weight::of(logit) : Weight();
  };
  Weight drawn;
  for (int64_t j = begin + lane; j < end; j += warp_lanes) drawn = drawn + weight_of(j);
  undrawn = warp_total(undrawn);
  drawn = warp_total(drawn);
  if (lane == 0) {
    reports[warp].undrawn = undrawn;
    reports[warp].drawn = drawn;
  }
  __syncthreads();
  Weight after;  // what is still in the race behind this warp's winners
  if (lane < warps) after = lane > warp ? reports[lane].undrawn + reports[lane].drawn : reports[lane].undrawn;
  after = warp_total(after);
  double result = 0.0;
  for (int64_t last = end; last > begin; last -= warp_lanes) {
    const Weight own = weight_of(last - 1 - lane);
    Weight racing = own;
    for (int apart = 1; apart < warp_lanes; apart *= 2) {
      const Weight before(__shfl_up_sync(all_lanes, racing.total, apart),
                          __shfl_up_sync(all_lanes, racing.exponent, apart));
      if (lane >= apart) racing = racing + before;
    }
    racing = racing + after;
    if (own.total > 0.0) result += log_share(own, racing);
    after = Weight(__shfl_sync(all_lanes, racing.total, warp_lanes - 1),
                   __shfl_sync(all_lanes, racing.exponent, warp_lanes - 1));
  }
  result = warp_sum(result);
  if (lane == 0) reports[warp].log_prob = result;
  __syncthreads();
  double all = 0.0;
  for (int w = 0; w < warps; ++w) all += reports[w].log_prob;
  return all;
}

}  // namespace cacovid::cuda
