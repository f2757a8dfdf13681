// How many tokens each frame keeps: the arithmetic of one video.
#pragma once

#include <cmath>
#include <limits>

#include "cacovid/exact.h"

namespace cacovid {

// Everything about a video's budget that the host knows before it sees a score.
struct BudgetPlan {
  int64_t frames = 0;
  int64_t tokens_per_frame = 0;
  int64_t num_keep = 0;    // tokens kept in the video, exactly
  int64_t num_ranked = 0;  // of these, how many are chosen by score; the rest fill uniformly
  int64_t cap = 0;         // most ranked tokens of one frame before levelling
  double quota = 0;        // ranked tokens that the frame weights are multiplied with
  double weight_min = 0;   // clip of the frame softmax
  double weight_max = 0;
  bool float_ranks = false;  // uniform ranks as float32 linspace (published code) or exact integers
};

struct BudgetOptions {
  double keep_ratio;
  double importance_ratio;
  double max_frame_ratio;
  bool strict;
  bool fill;
};

// x inside [low, high]; NaN gives high. No ratio, however odd, may become an integer that memory depends on.
inline double bounded(double x, double low, double high) { return !(x < high) ? high : x > low ? x : low; }

// The order of the products is that of the published code: it decides which side of an integer they fall.
inline BudgetPlan plan_budget(int64_t t, int64_t h, int64_t w, int64_t num_keep, const BudgetOptions& o) {
  BudgetPlan p;
  p.frames = t;
  p.tokens_per_frame = h * w;
  p.num_keep = num_keep;
  const double dt = static_cast<double>(t), dh = static_cast<double>(h), dw = static_cast<double>(w);
  const double per_frame = static_cast<double>(p.tokens_per_frame);
  const double ranked = bounded(o.importance_ratio * o.keep_ratio * dh * dw * dt, 0.0, per_frame * dt);
  const int64_t floor_ranked = static_cast<int64_t>(std::floor(ranked));
  p.num_ranked = !o.fill || o.importance_ratio == 1.0 || floor_ranked > num_keep ? num_keep : floor_ranked;
  p.quota = round_even(ranked);
  p.weight_min = 1.0 / (2.0 * dt);
  p.weight_max = bounded(1.0 / (dt * o.keep_ratio) * o.max_frame_ratio, 0.0, 1.0);
  p.cap = static_cast<int64_t>(bounded(o.importance_ratio * dh * dw * o.max_frame_ratio, 0.0, per_frame));
  const int64_t feasible = (p.num_ranked + t - 1) / (t > 0 ? t : 1);
  if (o.strict && p.cap < feasible) p.cap = feasible;
  if (p.cap > p.tokens_per_frame) p.cap = p.tokens_per_frame;
  // float32 ranks stay strictly increasing while the spacing exceeds 1 by more than its rounding.
  const double last = static_cast<double>(p.frames * p.tokens_per_frame - p.num_ranked - 1);
  const double gaps = static_cast<double>(p.num_keep - p.num_ranked - 1);
  p.float_ranks =
      !o.strict && last < 16777216.0 && gaps > 0 && last > gaps * (1.0 + (last + 1.0) * 4.76837158203125e-07);
  return p;
}

// ---- shares of the frames ----------------------------------------------------------------------

constexpr double infinite_score = std::numeric_limits<double>::infinity();
constexpr double no_chance = -infinite_score;

// A frame score scaled to [-3, 3], the largest finite magnitude of the video to 3. Never falls as x rises.
CACOVID_HD double frame_logit(double x, double largest) {
  // 0 where every finite score is 0: the published code divides zero by zero there.
  const double scaled = largest > 0.0 ? x / largest * 3.0 : 0.0;
  return x == infinite_score ? 3.0 : x > no_chance ? scaled : no_chance;
}

// The clipped softmax in fixed point; `norm` is the sum of e over the frames.
CACOVID_HD int64_t frame_weight(double e, double norm, double weight_min, double weight_max) {
  const double weight = e / norm, raised = weight < weight_min ? weight_min : weight;
  return to_fixed(weight_max < raised ? weight_max : raised);
}

// Ranked tokens of a frame before levelling; `total` is the sum of all weights.
CACOVID_HD int64_t frame_share(int64_t weight, int64_t total, double quota, int64_t cap) {
  const double norm = static_cast<double>(total > 1 ? total : 1);
  const int64_t share = static_cast<int64_t>(round_even(static_cast<double>(weight) * quota / norm));
  const int64_t raised = share > 1 ? share : 1;
  return raised < cap ? raised : cap;
}

// ---- uniform fill ------------------------------------------------------------------------------

// Uniformly spaced positions among `unranked` tokens, strictly increasing.
struct UniformFill {
  int64_t count = 0;
  int64_t unranked = 0;
  bool float_ranks = false;
  float last = 0, step = 0;    // of the float32 linspace
  double spacing = 0;          // of the exact ranks
  double picks_per_token = 0;  // for a first guess of `below`

  CACOVID_HD UniformFill() {}
  CACOVID_HD explicit UniformFill(const BudgetPlan& p)
      : count(p.num_keep - p.num_ranked),
        unranked(p.frames * p.tokens_per_frame - p.num_ranked),
        float_ranks(p.float_ranks) {
    if (count <= 1) return;
    last = static_cast<float>(unranked - 1);
    step = last / static_cast<float>(count - 1);
    spacing = static_cast<double>(unranked - 1) / static_cast<double>(count - 1);
    picks_per_token = static_cast<double>(count - 1) / static_cast<double>(unranked - 1);
  }

  CACOVID_HD int64_t operator[](int64_t j) const {
    if (count <= 1) return 0;
    if (float_ranks) {
      const float up = step * static_cast<float>(j);
      // One rounding, like the fused multiply-add that torch's vectorised code has here; exact as float64.
      const double down = static_cast<double>(last) - static_cast<double>(step) * static_cast<double>(count - 1 - j);
      return static_cast<int64_t>(round_even(static_cast<double>(j < count / 2 ? up : static_cast<float>(down))));
    }
    // j * (unranked - 1) / (count - 1), half to even. The product is off by less than 1 from the quotient, and what
    // remains is exact: no division of 64-bit integers.
    const int64_t gaps = count - 1, quotient = round_even_bits(static_cast<double>(j) * spacing);
    const int64_t twice = 2 * (j * (unranked - 1) - quotient * gaps), odd = quotient & 1;
    return quotient + (twice + odd > gaps ? 1 : 0) - (twice - odd < -gaps ? 1 : 0);
  }

  // Number of positions below `bound`: a guess by proportion, then a step or two.
  CACOVID_HD int64_t below(int64_t bound) const {
    if (count == 0 || bound <= 0) return 0;
    if (bound >= unranked) return count;
    int64_t j = static_cast<int64_t>(static_cast<double>(bound) * picks_per_token + 0.5);
    j = j < count ? j : count;
    while (j < count && (*this)[j] < bound) ++j;
    while (j > 0 && (*this)[j - 1] >= bound) --j;
    return j;
  }
};

}  // namespace cacovid
