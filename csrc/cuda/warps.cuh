// What the warps of a block tell each other.
#pragma once

#include "launch.cuh"

namespace cacovid::cuda {

constexpr uint32_t all_lanes = 0xffffffffu;

// Bits of a word of ballots that belong to lower lanes.
__device__ __forceinline__ uint32_t count_before(uint32_t ballots, uint32_t lane) {
  return static_cast<uint32_t>(__popc(ballots & ((1u << lane) - 1)));
}

struct Sum {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a + b; }
};
struct Largest {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};
struct Union {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

// Reductions over a block, each with one barrier, that order its memory like one: two buffers take turns, and who
// writes to one again has passed the barrier that all reach after they read it. A block of one warp needs neither.
class Warps {
 public:
  static size_t shared_words(int warps) { return size_t{2} * warps * warp_lanes; }

  __device__ explicit Warps(uint32_t* shared)
      : lane(threadIdx.x % warp_lanes), warp(threadIdx.x / warp_lanes), count(blockDim.x / warp_lanes), at_(shared) {}

  const uint32_t lane, warp, count;

  __device__ __forceinline__ void barrier() const {
    if (count == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Every lane's x combined with those of the same lane of the other warps.
  template <class Combine>
  __device__ __forceinline__ uint32_t across(uint32_t x, Combine combine) {
    if (count > 1) {
      uint32_t* buffer = turn();
      buffer[warp * warp_lanes + lane] = x;
      __syncthreads();
      x = buffer[lane];
      for (uint32_t w = 1; w < count; ++w) x = combine(x, buffer[w * warp_lanes + lane]);
    } else {
      __syncwarp();
    }
    return x;
  }

  __device__ __forceinline__ uint32_t sum(uint32_t x) { return across(__reduce_add_sync(all_lanes, x), Sum()); }

  // Of numbers whose sum is below 2^63: in limbs of 22 bits, which a warp adds in one instruction each.
  __device__ __forceinline__ int64_t sum_wide(int64_t x) {
    constexpr uint32_t limb = (1u << 22) - 1;
    const uint32_t low = __reduce_add_sync(all_lanes, static_cast<uint32_t>(x) & limb);
    const uint32_t middle = __reduce_add_sync(all_lanes, static_cast<uint32_t>(x >> 22) & limb);
    const uint32_t high = __reduce_add_sync(all_lanes, static_cast<uint32_t>(x >> 44));
    const uint32_t mine = across(lane == 0 ? low : lane == 1 ? middle : high, Sum());
    return static_cast<int64_t>(__shfl_sync(all_lanes, mine, 0)) +
           (static_cast<int64_t>(__shfl_sync(all_lanes, mine, 1)) << 22) +
           (static_cast<int64_t>(__shfl_sync(all_lanes, mine, 2)) << 44);
  }

  // The sum of x, one number of each warp, over the warps before; `total` over all.
  __device__ __forceinline__ uint32_t before_warp(uint32_t x, uint32_t* total) {
    uint32_t* buffer = turn();
    if (lane == 0) buffer[warp] = x;
    barrier();
    uint32_t sum = 0, before = 0;
    for (uint32_t w = 0; w < count; ++w) {
      before = w == warp ? sum : before;
      sum += buffer[w];
    }
    *total = sum;
    return before;
  }

  // The sum of x over the threads before; `total` over all.
  __device__ __forceinline__ uint32_t before_thread(uint32_t x, uint32_t* total) {
    uint32_t inclusive = x;
    for (uint32_t step = 1; step < warp_lanes; step *= 2) {
      const uint32_t other = __shfl_up_sync(all_lanes, inclusive, step);
      inclusive += lane >= step ? other : 0;
    }
    return before_warp(__shfl_sync(all_lanes, inclusive, warp_lanes - 1), total) + inclusive - x;
  }

 private:
  __device__ __forceinline__ uint32_t* turn() {
    uint32_t* buffer = at_ + turn_ * count * warp_lanes;
    turn_ ^= 1;
    return buffer;
  }

  uint32_t* at_;
  uint32_t turn_ = 0;
};

}  // namespace cacovid::cuda
