// The hot loops of online combination space sampling, compiled once per instruction set from
// combination_space.inl and combination_draws.inl.
#pragma once

#include "cacovid/combinations.h"
#include "isa/noise_loops.h"

namespace cacovid::cpu {

constexpr int64_t slot_block = 16;  // small_draws serves groups of at most this many tokens

// Slots of every group: 8 or a multiple of 16.
constexpr int64_t group_width(int64_t largest_group) {
  return largest_group <= 8 ? 8 : (largest_group + slot_block - 1) / slot_block * slot_block;
}

// The distribution that one frame's combinations are drawn from. Group g has the slots [g * width, (g + 1) * width):
// its tokens, ascending, then slots without a token. Weight is 0 and log_weight -inf there, as it is for tokens
// without a chance (-inf and NaN). Arrays of slots are padded to a multiple of 16, and so are those of groups.
struct FrameSpace {
  int64_t width;
  uint32_t* order;  // [P + width] tokens by rank
  uint32_t* token;  // [G * width] token in the frame
  float* weight;    // inside the group
  float* log_weight;
  float* exps;     // scratch
  int64_t* fixed;  // scratch
  double* share;   // [G] probability of every group that can be drawn, then 0
  float* log_share;
  uint32_t* cumulative;  // running sums of the share weights
  int64_t open;          // groups that can be drawn
  int64_t valid;         // tokens that have a chance
};

// Draws of one frame.
struct FrameDraws {
  int64_t first_sample, count;
  int64_t frame, video;  // who the frame is to the generator
  uint64_t seed;
  uint32_t step;
  int64_t token_base;  // added to every token of the output
  int64_t* tokens;     // of sample s at tokens + s * token_stride, ascending
  int64_t token_stride;
  int64_t* groups;  // of sample s at groups[s * frame_stride]
  float* log_prob;
  int64_t frame_stride;
};

struct CombinationLoops {
  // exp(score - best) of n scores; where best is +inf, 1 for those and 0 for all others. `exps` may be `scores`.
  void (*exps)(const float* scores, int64_t n, float best, float* exps);

  // The distribution of a frame from its keys.
  void (*prepare)(const KeyRow& keys, const CombinationPlan& plan, FrameSpace& space);

  // Group of each of the draws, int32 [count] padded to 16.
  void (*draw_groups)(const FrameSpace& space, const FrameDraws& draws, int32_t* groups);

  // Tokens, group and log-probability of each of the draws, for groups of at most slot_block tokens, of which
  // num_draw have a chance.
  void (*small_draws)(const FrameSpace& space, const CombinationPlan& plan, const FrameDraws& draws,
                      const int32_t* groups);
};

inline const CombinationLoops& combination_loops() { return *hot_loops().combinations; }

}  // namespace cacovid::cpu
