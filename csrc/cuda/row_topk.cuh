// The k best of a row of scores: by a warp that holds their keys in registers, or by a block that reads them again.
#pragma once

#include "score_rows.cuh"
#include "warps.cuh"

namespace cacovid::cuda {

// Keys above `key` are kept, and the first `ties` of those equal to it.
struct Threshold {
  uint32_t key, ties;
};

// ---- a warp ------------------------------------------------------------------------------------

// Lane l holds the tokens l, l + 32, ...: their scores' bits, until the keys are made of them. Behind the end of the
// row they are those of a NaN, whose key, 0, is the last choice.
template <int Keys>
__device__ __forceinline__ void load_row(const char* row, const ScoreRows& scores, uint32_t tokens, uint32_t lane,
                                         uint32_t (&bits)[Keys]) {
  const char* at = row + lane * scores.stride;
#pragma unroll
  for (int i = 0; i < Keys; ++i, at += warp_lanes * scores.stride) {
    bits[i] = i * warp_lanes + lane < tokens ? load_bits(at, scores.dtype) : 0xffffffffu;
  }
}

// Returns the status of the row.
template <int Keys>
__device__ __forceinline__ int32_t make_keys(KeyFormat format, uint32_t tokens, uint32_t (&keys)[Keys]) {
  uint32_t odd = 0;  // NaNs in the lower half, infinities in the upper one
#pragma unroll
  for (int i = 0; i < Keys; ++i) {
    keys[i] = format.key(keys[i]);
    odd += (keys[i] == key_nan ? 1 : 0) + (keys[i] == format.posinf() ? 1 << 16 : 0);
  }
  odd = __reduce_add_sync(all_lanes, odd);
  return ((odd & 0xffff) > Keys * warp_lanes - tokens ? status_nan : 0) | (odd >> 16 > 0 ? status_posinf : 0);
}

// The k-th largest key bit by bit, until a prefix tells the k best from the others.
template <int Keys>
__device__ __forceinline__ Threshold find_threshold(const uint32_t (&keys)[Keys], uint32_t k, int idle) {
  uint32_t threshold = 0, above = 0;
  for (uint32_t bit = 1u << 31; bit >= 1u << idle; bit >>= 1) {
    const uint32_t candidate = threshold | bit;
    uint32_t reach = 0;
#pragma unroll
    for (int i = 0; i < Keys; ++i) reach += keys[i] >= candidate;
    reach = __reduce_add_sync(all_lanes, reach);
    if (reach == k) return {candidate - 1, 0};
    threshold = reach > k ? candidate : threshold;
    above = reach > k ? above : reach;
  }
  return {threshold, k - above};
}

// Which of the tokens are kept: lane i gets the word of those from 32 * i on.
template <int Keys>
__device__ __forceinline__ uint32_t ranked_words(const uint32_t (&keys)[Keys], Threshold threshold, uint32_t lane) {
  uint32_t own = 0, left = threshold.ties;
#pragma unroll
  for (int i = 0; i < Keys; ++i) {
    uint32_t word = __ballot_sync(all_lanes, keys[i] > threshold.key);
    if (left > 0) {
      const bool is_equal = keys[i] == threshold.key;
      const uint32_t equal = __ballot_sync(all_lanes, is_equal);
      const uint32_t first = __ballot_sync(all_lanes, is_equal && count_before(equal, lane) < left);
      word |= first;
      left -= __popc(first);
    }
    own = lane == static_cast<uint32_t>(i) ? word : own;
  }
  return own;
}

// ---- a block -----------------------------------------------------------------------------------

constexpr int digit_bits = 11;
constexpr int histogram_words = (1 << digit_bits) + 4;

// The k-th largest key of a row of any length, a digit at a time from above; `status` of its scores.
__device__ inline Threshold find_long_threshold(const char* row, const ScoreRows& scores, int64_t tokens, uint32_t k,
                                                uint32_t* histogram, Warps& block, int32_t* status) {
  uint32_t* found = histogram + (1 << digit_bits);  // digit, and keys above it
  const KeyFormat format(scores.dtype);
  uint32_t prefix = 0, left = k, odd = 0;
  int end = 32;
  while (end > format.idle) {
    const int shift = end > digit_bits ? end - digit_bits : 0, bits = end - shift;
    for (uint32_t i = threadIdx.x; i < 1u << digit_bits; i += blockDim.x) histogram[i] = 0;
    block.barrier();
    for (int64_t i = threadIdx.x; i < tokens; i += blockDim.x) {
      const uint32_t key = format.key(load_bits(row + i * scores.stride, scores.dtype));
      odd |= format.flags(key);
      if (end == 32 || key >> end == prefix) atomicAdd(&histogram[key >> shift & ((1u << bits) - 1)], 1u);
    }
    block.barrier();
    if (block.warp == 0) {
      // Lane 0 has the highest digits: what lies above a lane's digits is the sum over the lanes before.
      constexpr uint32_t each = (1 << digit_bits) / warp_lanes;
      const uint32_t top = (1 << digit_bits) - 1 - block.lane * each;
      uint32_t own = 0;
      for (uint32_t i = 0; i < each; ++i) own += histogram[top - i];
      uint32_t above = own;
      for (uint32_t step = 1; step < warp_lanes; step *= 2) {
        const uint32_t other = __shfl_up_sync(all_lanes, above, step);
        above += block.lane >= step ? other : 0;
      }
      above -= own;
      if (above < left && left <= above + own) {
        uint32_t digit = top;
        for (; above + histogram[digit] < left; --digit) above += histogram[digit];
        found[0] = digit;
        found[1] = above;
      }
    }
    block.barrier();
    if (k > 0) {
      prefix = prefix << bits | found[0];
      left -= found[1];
    }
    end = shift;
    block.barrier();
  }
  *status = static_cast<int32_t>(block.across(__reduce_or_sync(all_lanes, odd), Union()));
  return k > 0 ? Threshold{prefix << end, left} : Threshold{all_lanes, 0};
}

}  // namespace cacovid::cuda
