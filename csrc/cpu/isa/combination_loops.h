// The hot loops of online combination space sampling, compiled once per instruction set from
// combination_loops.inl.
#pragma once

#include "cacovid/combinations.h"
#include "isa/noise_loops.h"

namespace cacovid::cpu {

constexpr int64_t most_slots = 16;  // tokens of a group that small_draws can hold

// The distribution that one frame's combinations are drawn from; tokens in ranked order, -inf and NaN last.
// Arrays of tokens hold padded(P) + most_slots, arrays of groups padded(G).
struct FrameSpace {
  uint32_t* order;       // token in the frame
  double* weight;        // inside its group; 0 without a chance
  float* slot_weight;    // the same in float32
  float* log_weight;     // -inf without a chance
  double* share;         // probability of every group that can be drawn
  float* log_share;
  uint32_t* cumulative;  // running sums of the share weights; groups beyond `open` repeat the total
  const uint32_t* start; // [G + 1] rank of each group's first token, given
  double* exps;          // scratch
  int64_t* fixed;        // scratch
  int64_t open;          // groups that can be drawn
  int64_t valid;         // tokens that have a chance
};

// Draws of one frame.
struct FrameDraws {
  int64_t first_sample, count;
  int64_t frame, video;  // who the frame is to the generator
  uint64_t seed;
  uint32_t step;
  int64_t token_base;    // added to every token of the output
  int64_t* tokens;       // of sample s at tokens + s * token_stride, ascending
  int64_t token_stride;
  int64_t* groups;       // of sample s at groups[s * frame_stride]
  float* log_prob;
  int64_t frame_stride;
};

struct CombinationLoops {
  // The distribution of a frame from its keys.
  void (*prepare)(const KeyRow& keys, const CombinationPlan& plan, FrameSpace& space);

  // Group of each of the draws, int32 [count].
  void (*draw_groups)(const FrameSpace& space, const FrameDraws& draws, int32_t* groups);

  // Tokens, group and log-probability of each of the draws, for groups of at most most_slots tokens that all hold
  // num_draw with a chance.
  void (*small_draws)(const FrameSpace& space, const CombinationPlan& plan, const FrameDraws& draws,
                      const int32_t* groups);
};

inline const CombinationLoops& combination_loops() { return *hot_loops().combinations; }

}  // namespace cacovid::cpu
