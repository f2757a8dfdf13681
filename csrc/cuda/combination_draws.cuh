// Races: what a combination takes from one group of ranked items, without replacement.
#pragma once

#include "cacovid/philox.h"
#include "combination_space.cuh"

namespace cacovid::cuda {

// The draws of one block, and where they go.
struct Draws {
  Groups groups;
  int32_t wanted;      // items of a combination
  int32_t lanes;       // that race side by side: 8, 16 or 32; 0: the whole block
  int32_t begin, end;  // samples
  uint64_t seed;       // philox.h
  uint32_t step, row, stream;
  uint32_t frame, first_column;  // who draws a group, and who item 0 is
  int64_t first_item;            // added to the items of the output
  int64_t* indices;              // of sample s at indices + s * index_stride, ascending, then -1
  int64_t* group_of;             // of sample s at group_of[s * stride]; null: not wanted
  float* log_prob;               // of sample s at log_prob[s * stride]
  uint32_t* packed;              // of sample s at packed + s * packed_stride, a bit per item; null: not wanted
  int64_t index_stride, stride, packed_stride;

  // Bits that decide the group; they wait for no score.
  __device__ __forceinline__ uint32_t group_bits(int sample) const {
    return random_bits(seed, frame, row, step, stream_word(stream_groups, static_cast<uint32_t>(sample)));
  }
  __device__ __forceinline__ uint32_t noise_bits(uint32_t item, int sample) const {
    return random_bits(seed, first_column + item, row, step, stream_word(stream, static_cast<uint32_t>(sample)));
  }
  __device__ __forceinline__ void store_group(int sample, int group, float ln) const {
    const int64_t at = sample * stride;
    if (group_of != nullptr) group_of[at] = sample == 0 ? -1 : group;
    log_prob[at] = sample == 0 ? 0.0f : ln;
  }
};

__device__ __forceinline__ int drawn_group(const Space& s, uint32_t bits) {
  int low = 0, high = *s.open - 1;
  const int64_t threshold = high > 0 ? share_threshold(bits, s.cumulative[high]) : 0;
  while (low < high) {
    const int middle = (low + high) / 2;
    const bool passed = static_cast<int64_t>(s.cumulative[middle]) <= threshold;
    low = passed ? middle + 1 : low;
    high = passed ? high : middle;
  }
  return low;
}

// The group of a sample: the best items, of which the first combination consists, are one, too.
struct Members {
  int group, start, length;
};
__device__ __forceinline__ Members members_of(const Draws& d, const Space& s, int sample, uint32_t bits) {
  if (sample == 0) return {0, 0, d.wanted};
  const int group = drawn_group(s, bits);
  return {group, d.groups.start(group), d.groups.length(group)};
}

// Order key of an item in the race; 0 stays out. In sample 0 the ranks decide.
__device__ __forceinline__ uint32_t race_key(const Draws& d, float weight, uint32_t item, int sample, int slot) {
  if (!(weight > 0.0f)) return 0;
  if (sample == 0) return ~static_cast<uint32_t>(slot);
  return order_key(ln_float(weight) + gumbel_noise(d.noise_bits(item, sample)));
}

__device__ __forceinline__ int first_sample_of_lane(const Draws& d) {
  const int lanes = d.lanes > 0 ? d.lanes : static_cast<int>(blockDim.x);
  return d.begin + static_cast<int>(threadIdx.x) / lanes;
}

// Groups of up to 32 items: some lanes of a warp per sample, an item each. Everyone meets everyone else: who is beaten
// by less than `wanted` others is drawn; what was still in the race then, itself and whom it beats, gives its chance.
__device__ inline void draw_by_lanes(const Draws& d, const Space& s, const uint64_t* ranked, uint32_t group_bits) {
  const int lanes = d.lanes, lane = threadIdx.x % warp_lanes, slot = lane & (lanes - 1), segment = lane - slot;
  const int samples = static_cast<int>(blockDim.x) / lanes;
  const int of_warp = (static_cast<int>(threadIdx.x) - lane) / lanes, own = first_sample_of_lane(d);
  for (int round = 0; d.begin + of_warp + round < d.end; round += samples) {
    const bool exists = own + round < d.end;
    const int sample = exists ? own + round : d.end - 1;
    if (round > 0) group_bits = d.group_bits(sample);
    const Members m = members_of(d, s, sample, group_bits);
    const bool present = slot < m.length;
    const uint32_t item = present ? rank_index(ranked[m.start + slot]) : 0xffffffffu;
    const float weight = present ? s.weight[m.start + slot] : 0.0f;
    const uint32_t key = race_key(d, weight, item, sample, slot);
    float racing = weight;
    int place = 0;
    uint32_t lower = 0;  // slots with lower items
    for (int turn = 1; turn < lanes; ++turn) {
      const int rival = (slot + turn) & (lanes - 1);
      const uint32_t other_key = __shfl_sync(all_lanes, key, segment + rival);
      const uint32_t other_item = __shfl_sync(all_lanes, item, segment + rival);
      const float other_weight = __shfl_sync(all_lanes, weight, segment + rival);
      const bool wins = other_key > key || (other_key == key && other_item < item);
      place += wins;
      racing += wins ? 0.0f : other_weight;
      lower |= static_cast<uint32_t>(other_item < item) << rival;
    }
    const bool drawn = key > 0 && place < d.wanted;
    const uint32_t winners = __ballot_sync(all_lanes, drawn) >> segment & (0xffffffffu >> (warp_lanes - lanes));
    const float inside = warp_sum(drawn ? ln_float(weight / racing) : 0.0f, lanes);
    int64_t* indices = d.indices + sample * d.index_stride;
    if (exists && drawn) indices[__popc(winners & lower)] = d.first_item + item;
    if (exists && slot >= __popc(winners) && slot < d.wanted) indices[slot] = -1;
    if (exists && slot == 0) d.store_group(sample, m.group, s.log_share[m.group] + inside);
    if (d.packed == nullptr) continue;
    const int words = (d.groups.items + 31) / 32;
    for (int first = 0; first < words; first += lanes) {
      uint32_t word = 0;
      for (int other = 0; other < lanes; ++other) {
        const uint32_t other_item = __shfl_sync(all_lanes, item, segment + other);
        const bool here = (winners >> other & 1) != 0 && other_item / 32 == static_cast<uint32_t>(first + slot);
        word |= here ? 1u << other_item % 32 : 0u;
      }
      if (exists && first + slot < words) d.packed[sample * d.packed_stride + first + slot] = word;
    }
  }
}

// ln of the probability that a race arrived in the order `order` of which the first `drawn` count, by the first warp:
// from the last place to the first, so that nothing is ever subtracted.
__device__ inline double log_prob_of_order(const uint64_t* order, const float* weight, int racing, int drawn) {
  const int lane = threadIdx.x % warp_lanes;
  double after = 0.0, result = 0.0;
  for (int last = racing; last > 0; last -= warp_lanes) {
    const int place = last - 1 - lane;
    const float own = place >= 0 ? weight[~static_cast<uint32_t>(order[place]) & 0xfff] : 0.0f;
    const double total = after + running_sum(static_cast<double>(own), lane);
    if (place >= 0 && place < drawn) result += static_cast<double>(ln_float(own / static_cast<float>(total)));
    after = __shfl_sync(all_lanes, total, warp_lanes - 1);
  }
  return warp_sum(result);
}

// Larger groups: the block sorts the arrivals of one sample after another.
__device__ inline void draw_by_block(const Draws& d, const Space& s, const uint64_t* ranked, uint32_t group_bits) {
  uint64_t* arrivals = ranked == s.words ? s.other : s.words;
  const int words = (d.groups.items + 31) / 32;
  for (int sample = d.begin; sample < d.end; ++sample) {
    if (sample > d.begin) group_bits = d.group_bits(sample);
    const Members m = members_of(d, s, sample, group_bits);
    const int racing = min(max(*s.valid - m.start, 0), m.length), found = min(d.wanted, racing);
    for (int i = threadIdx.x; i < padded_run(m.length); i += blockDim.x) {
      uint64_t word = 0;
      if (i < m.length) {
        const uint32_t item = rank_index(ranked[m.start + i]);
        // Of equal keys the lower item comes first; both numbers are below 2^12.
        const uint32_t key = race_key(d, s.weight[m.start + i], item, sample, i);
        word = static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~(item << 12 | static_cast<uint32_t>(i)));
      }
      arrivals[i] = word;
    }
    for (int i = threadIdx.x; i < words; i += blockDim.x) s.mask[i] = 0;
    __syncthreads();
    const uint64_t* order = sort_falling(arrivals, s.third, m.length);
    for (int i = threadIdx.x; i < found; i += blockDim.x) {
      const uint32_t item = ~static_cast<uint32_t>(order[i]) >> 12;
      atomicOr(s.mask + item / 32, 1u << item % 32);
    }
    if (threadIdx.x < warp_lanes) {
      const double inside = log_prob_of_order(order, s.weight + m.start, racing, found);
      const float ln = static_cast<float>(static_cast<double>(s.log_share[m.group]) + inside);
      if (threadIdx.x == 0) d.store_group(sample, m.group, ln);
    }
    __syncthreads();
    int64_t* indices = d.indices + sample * d.index_stride;
    for (int i = threadIdx.x; i < d.wanted; i += blockDim.x) {
      if (i >= found) {
        indices[i] = -1;
        continue;
      }
      const uint32_t item = ~static_cast<uint32_t>(order[i]) >> 12;
      int below = __popc(s.mask[item / 32] & ((1u << item % 32) - 1));
      for (uint32_t w = 0; w < item / 32; ++w) below += __popc(s.mask[w]);
      indices[below] = d.first_item + item;
    }
    if (d.packed != nullptr) {
      for (int i = threadIdx.x; i < words; i += blockDim.x) d.packed[sample * d.packed_stride + i] = s.mask[i];
    }
    __syncthreads();  // before the next sample takes the memory
  }
}

}  // namespace cacovid::cuda
