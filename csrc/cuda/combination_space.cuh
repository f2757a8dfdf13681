// The distribution that a block draws from, in its shared memory: a frame's tokens by rank and their groups, or the
// frames of a video.
#pragma once

#include "block_sort.cuh"
#include "cacovid/combinations.h"
#include "cacovid/gumbel.h"
#include "warp_sums.cuh"

namespace cacovid::cuda {

// Groups of ranked items; frames are one group.
struct Groups {
  int32_t items, count;
  int32_t size, remainder;  // the first `remainder` groups hold one item more

  __device__ __forceinline__ int start(int group) const { return group * size + min(group, remainder); }
  __device__ __forceinline__ int length(int group) const { return size + (group < remainder ? 1 : 0); }
  __device__ __forceinline__ int of_rank(int rank) const {
    const int longer = remainder * (size + 1);
    return rank < longer
               ? static_cast<int>(static_cast<unsigned>(rank) / static_cast<unsigned>(size + 1))
               : remainder + static_cast<int>(static_cast<unsigned>(rank - longer) / static_cast<unsigned>(size));
  }
};

struct Space {
  uint64_t *words, *other;  // [padded_run(items)] each
  uint64_t* third;          // where a block races
  double* share;            // [count], of frames [items]
  float* weight;            // [items] by rank; 0 without a chance
  float* scale;             // [count]
  float* log_share;         // [count]
  uint32_t* cumulative;     // [count] running sums of the share weights
  uint32_t* mask;           // [ceil(items / 32)] where a block races
  int32_t* valid;           // items that have a chance
  int32_t* open;            // groups that can be drawn

  CACOVID_HD static constexpr int64_t bytes(int64_t items, int64_t groups, int64_t shares, bool races) {
    return padded_run(items) * (races ? 24 : 16) + shares * 8 + items * 4 + groups * 12 +
           (races ? (items + 31) / 32 * 4 : 0) + 8;
  }

  __device__ Space(unsigned char* memory, int64_t items, int64_t groups, int64_t shares, bool races) {
    words = reinterpret_cast<uint64_t*>(memory);
    other = words + padded_run(items);
    third = other + padded_run(items);
    share = reinterpret_cast<double*>(words + (races ? 3 : 2) * padded_run(items));
    weight = reinterpret_cast<float*>(share + shares);
    scale = weight + items;
    log_share = scale + groups;
    cumulative = reinterpret_cast<uint32_t*>(log_share + groups);
    mask = cumulative + groups;
    valid = reinterpret_cast<int32_t*>(mask + (races ? (items + 31) / 32 : 0));
    open = valid + 1;
  }
};

// Shares of a warp: lane l alone touches those of l, l + 32, ...
struct WarpShares {
  double* share;
  int size, lane;

  __device__ __forceinline__ double at(int64_t i) const {
    const int owner = static_cast<int>(i) % warp_lanes;
    return __shfl_sync(all_lanes, lane == owner ? share[i] : 0.0, owner);
  }
  __device__ __forceinline__ void put(int64_t i, double x) const {
    if (lane == static_cast<int>(i) % warp_lanes) share[i] = x;
  }
  __device__ __forceinline__ int64_t raise(int64_t first, int64_t n, double least) const {
    int64_t total = 0;
    for (int i = lane; i < n; i += warp_lanes) {
      if (i < first) continue;
      const double raised = share[i] > least ? share[i] : least;
      share[i] = raised;
      total += to_fixed(raised);
    }
    return warp_sum(total);
  }
  __device__ __forceinline__ void finish(int64_t first, int64_t n, double scale) const {
    for (int i = lane; i < size; i += warp_lanes) share[i] = i < first ? share[i] : i < n ? share[i] * scale : 0.0;
  }
};

// exp(score - best); where a score is +inf, 1 for those and 0 for all others.
__device__ __forceinline__ float exp_of(uint32_t key, uint32_t best) {
  if (best == key_posinf) return key == best ? 1.0f : 0.0f;
  return exp_float(key_score(key) - key_score(best));
}

// From ranked words: `weight` becomes exp(score - best), `valid` is found. A barrier has to follow.
__device__ inline void fill_exps(const uint64_t* ranked, const Space& s, int items) {
  const uint32_t best = static_cast<uint32_t>(ranked[0] >> 32);
  for (int r = threadIdx.x; r < items; r += blockDim.x) {
    const uint32_t key = static_cast<uint32_t>(ranked[r] >> 32);
    s.weight[r] = exp_of(key, best);
    const bool ends = r + 1 == items || static_cast<uint32_t>(ranked[r + 1] >> 32) <= key_neginf;
    if (key > key_neginf && ends) *s.valid = r + 1;
    if (r == 0 && key <= key_neginf) *s.valid = 0;
  }
}

// Weights of a frame's tokens, inside their groups, and probabilities of the groups. The first warp finds the shares;
// while it caps them, which is a chain of a division for every group cut, the others compute the weights.
__device__ inline void find_groups(const Space& s, const Groups& groups, int num_draw, double cap) {
  const int lane = threadIdx.x % warp_lanes;
  const bool first_warp = threadIdx.x < warp_lanes;
  if (first_warp) {
    int64_t all = 0;
    for (int g = lane; g < groups.count; g += warp_lanes) {
      int64_t inside = 0;
      for (int i = 0; i < groups.length(g); ++i) {
        inside += to_fixed(static_cast<double>(s.weight[groups.start(g) + i]));
      }
      s.share[g] = from_fixed(inside);
      all += inside;
    }
    all = warp_sum(all);
    const double total = from_fixed(all > 0 ? all : 1), inverse = 1.0 / total;
    for (int g = lane; g < groups.count; g += warp_lanes) {
      s.share[g] = s.share[g] * inverse;
      s.scale[g] = weight_scale(s.share[g], total);
    }
  }
  __syncthreads();
  const int valid = *s.valid;
  if (!first_warp) {
    const float uniform = static_cast<float>(1.0 / static_cast<double>(groups.size));
    for (int r = threadIdx.x - warp_lanes; r < groups.items; r += blockDim.x - warp_lanes) {
      s.weight[r] = r < valid ? clamped_weight(s.weight[r] * s.scale[groups.of_rank(r)], uniform) : 0.0f;
    }
    return;
  }
  int open = 0;  // the first groups: those that hold num_draw tokens with a chance
  for (int g = lane; g < groups.count; g += warp_lanes) open += groups.start(g) + num_draw <= valid;
  open = max(warp_sum(open), 1);
  cap_shares(WarpShares{s.share, groups.count, lane}, open, cap);
  uint32_t before = 0;
  for (int first = 0; first < groups.count; first += warp_lanes) {
    const int g = first + lane;
    const double share = g < open ? s.share[g] : 0.0;
    const uint32_t running = before + running_sum(static_cast<uint32_t>(share_weight(share)), lane);
    if (g < groups.count) {
      s.cumulative[g] = running;
      s.log_share[g] = ln_float(g < open ? static_cast<float>(share) : 1.0f);
    }
    before = __shfl_sync(all_lanes, running, warp_lanes - 1);
  }
  if (lane == 0) *s.open = open;
}

// Weights of a video's frames, all by the first warp.
__device__ inline void find_frames(const Space& s, int frames, int64_t samples, bool strict) {
  if (threadIdx.x >= warp_lanes) return;
  const int lane = threadIdx.x % warp_lanes, valid = *s.valid;
  int64_t all = 0;
  for (int r = lane; r < frames; r += warp_lanes) all += to_fixed(static_cast<double>(s.weight[r]));
  all = warp_sum(all);
  const double inverse = 1.0 / from_fixed(all > 0 ? all : 1);
  for (int r = lane; r < frames; r += warp_lanes) s.share[r] = static_cast<double>(s.weight[r]) * inverse;
  if (strict) {
    cap_shares(WarpShares{s.share, frames, lane}, max(valid, 1), 3.0 / static_cast<double>(frames));
  } else {
    const double floor = 1.0 / static_cast<double>(samples * samples);
    for (int r = lane; r < frames; r += warp_lanes) s.share[r] = s.share[r] > floor ? s.share[r] : floor;
  }
  for (int r = lane; r < frames; r += warp_lanes) s.weight[r] = r < valid ? static_cast<float>(s.share[r]) : 0.0f;
  if (lane == 0) {
    *s.open = 1;
    s.log_share[0] = 0.0f;
  }
}

}  // namespace cacovid::cuda
