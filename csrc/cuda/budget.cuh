// Budgets of one video, computed by a block: the twin of csrc/cpu/budget.cpp.
#pragma once

#include "cacovid/budget.h"
#include "cacovid/ops.h"
#include "score_rows.cuh"
#include "warps.cuh"

namespace cacovid::cuda {

// Of a video whose budgets a block can keep in shared memory. Those of longer ones are made by a launch of their own,
// in global memory (budget.cu).
constexpr int64_t most_frames = 2048;

CACOVID_HD int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A double and a count for every frame.
struct BudgetMemory {
  double* numbers;   // [frames], then int64 weights in place
  uint32_t* counts;  // [frames], at a multiple of 16 bytes

  // Of 4 bytes.
  static CACOVID_HD int64_t words(int64_t frames) { return 3 * round_up(frames, 4); }
  static __device__ __forceinline__ const uint32_t* counts_in(const void* memory, int64_t frames) {
    return static_cast<const uint32_t*>(memory) + 2 * round_up(frames, 4);
  }
  __device__ __forceinline__ BudgetMemory(void* memory, int64_t frames)
      : numbers(static_cast<double*>(memory)), counts(const_cast<uint32_t*>(counts_in(memory, frames))) {}
};

// Where the counts of a video have to rise to, one token at a time and the smallest first, to have the right sum: all
// to `water`, and the first `rest` of those at it by one more. Where they have to fall, all numbers are mirrored.
struct Level {
  uint32_t water, rest, tokens;
  bool down;

  __device__ __forceinline__ uint32_t mirrored(uint32_t count) const { return down ? tokens - count : count; }
};

struct Ranked {
  uint32_t before, count;  // tokens kept by score in the frames before, and in the frame
};

// No sum here exceeds the tokens of a video, of which there are less than 2^31.
__device__ __forceinline__ uint32_t volume_below(uint32_t water, uint4 c) {
  const auto above = [water](uint32_t count) { return water > count ? water - count : 0; };
  return above(c.x) + above(c.y) + above(c.z) + above(c.w);
}

// 32 levels at a time, one per lane: two rounds for up to 1023 tokens in a frame, where a search by halves has ten.
// (A histogram of the counts would need an atomic operation for every frame, most of them on a few numbers.)
__device__ inline void find_level(const uint32_t* counts, uint32_t frames, uint32_t need, Warps& block, Level* level) {
  constexpr int digit_bits = 5;
  level->water = 0;
  level->rest = need;
  const uint4* quads = reinterpret_cast<const uint4*>(counts);
  for (int shift = (31 - __clz(static_cast<int>(level->tokens | 1))) / digit_bits * digit_bits; shift >= 0;
       shift -= digit_bits) {
    const bool exists = block.lane <= (level->tokens - level->water) >> shift;
    const uint32_t water = level->water + (exists ? block.lane << shift : 0);
    uint32_t volume = 0;
    for (uint32_t q = block.warp; q < frames / 4; q += block.count) {
      const uint4 c = quads[q];
      volume +=
          volume_below(water, {level->mirrored(c.x), level->mirrored(c.y), level->mirrored(c.z), level->mirrored(c.w)});
    }
    for (uint32_t f = frames / 4 * 4 + block.warp; f < frames; f += block.count) {
      const uint32_t count = level->mirrored(counts[f]);
      volume += water > count ? water - count : 0;
    }
    volume = block.across(volume, Sum());
    const int digit = __popc(__ballot_sync(all_lanes, exists && volume <= need)) - 1;  // volumes rise with the lane
    level->water = __shfl_sync(all_lanes, water, digit);
    level->rest = need - __shfl_sync(all_lanes, volume, digit);
  }
}

// Counts of the video's frames, from frame `first` on, before levelling, and the level. Every thread of the block
// comes here, and finds all counts written when it leaves.
__device__ inline Level video_budget(const BudgetPlan& plan, const FrameScores& scores, int64_t first,
                                     const BudgetMemory& memory, Warps& block) {
  const uint32_t frames = static_cast<uint32_t>(plan.frames);
  double* e = memory.numbers;
  uint32_t largest_bits = 0, best = 0;
  for (uint32_t f = threadIdx.x; f < frames; f += blockDim.x) {
    const float x = scores[first + f];
    const uint32_t magnitude = float_to_bits(x) & 0x7fffffffu;  // orders like the number
    largest_bits = Largest()(largest_bits, magnitude < 0x7f800000u ? magnitude : 0);
    best = Largest()(best, order_key(x));
    e[f] = static_cast<double>(x);
  }
  largest_bits = __reduce_max_sync(all_lanes, largest_bits);
  best = __reduce_max_sync(all_lanes, best);
  const uint32_t both = block.across(block.lane == 0 ? largest_bits : best, Largest());
  const double largest = static_cast<double>(bits_to_float(__shfl_sync(all_lanes, both, 0)));
  const double top = frame_logit(static_cast<double>(score_of(__shfl_sync(all_lanes, both, 1))), largest);

  int64_t total = 0;
  for (uint32_t f = threadIdx.x; f < frames; f += blockDim.x) {
    // Where no frame has a score to go by all are alike.
    e[f] = top == no_chance ? 1.0 : exp_exact(frame_logit(e[f], largest) - top);
    total += to_fixed(e[f]);
  }
  const double norm = from_fixed(block.sum_wide(total));

  int64_t* weights = reinterpret_cast<int64_t*>(e);
  total = 0;
  for (uint32_t f = threadIdx.x; f < frames; f += blockDim.x) {
    const int64_t weight = frame_weight(e[f], norm, plan.weight_min, plan.weight_max);
    weights[f] = weight;
    total += weight;
  }
  total = block.sum_wide(total);

  uint32_t sum = 0;
  for (uint32_t f = threadIdx.x; f < frames; f += blockDim.x) {
    const uint32_t count = static_cast<uint32_t>(frame_share(weights[f], total, plan.quota, plan.cap));
    memory.counts[f] = count;
    sum += count;
  }
  sum = block.sum(sum);
  const uint32_t ranked = static_cast<uint32_t>(plan.num_ranked);
  Level level = {0, 0, static_cast<uint32_t>(plan.tokens_per_frame), sum > ranked};
  find_level(memory.counts, frames, level.down ? sum - ranked : ranked - sum, block, &level);
  return level;
}

// The budget of a frame, by a warp.
__device__ __forceinline__ Ranked ranked_of(const uint32_t* counts, const Level& level, uint32_t frame, uint32_t lane) {
  uint32_t sum = 0, at_level = 0;
  for (uint32_t f = lane; f < frame; f += warp_lanes) {
    const uint32_t count = level.mirrored(counts[f]);
    sum += Largest()(count, level.water);
    at_level += count <= level.water;
  }
  sum = __reduce_add_sync(all_lanes, sum);
  at_level = __reduce_add_sync(all_lanes, at_level);
  sum += at_level < level.rest ? at_level : level.rest;
  const uint32_t own = level.mirrored(counts[frame]);
  const uint32_t count = Largest()(own, level.water) + (own <= level.water && at_level < level.rest ? 1 : 0);
  return {level.down ? frame * level.tokens - sum : sum, level.mirrored(count)};
}

inline bool same_plan(const BudgetPlan& a, const BudgetPlan& b) {
  return a.frames == b.frames && a.tokens_per_frame == b.tokens_per_frame && a.num_keep == b.num_keep &&
         a.num_ranked == b.num_ranked && a.cap == b.cap && a.quota == b.quota && a.weight_min == b.weight_min &&
         a.weight_max == b.weight_max && a.float_ranks == b.float_ranks;
}

// Entries of scratch for a video; its counts, in the end the tokens ranked before each frame, are the last third.
inline int64_t scratch_of(const BudgetPlan& plan) {
  return plan.frames > most_frames ? BudgetMemory::words(plan.frames) / 2 : 0;
}

inline int warps_for(int64_t frames, int most) {
  int warps = 1;
  while (warps < most && int64_t{warps} * warp_lanes < frames) warps *= 2;
  return warps;
}

// Budgets of the videos that have scratch into it, or of all, to `counts` and `status` [F] too.
int video_budgets(const FrameScores& scores, cpu::Videos videos, bool all, int64_t* scratch, int64_t* counts,
                  int32_t* status, Stream stream);

}  // namespace cacovid::cuda
