// Online combination space sampling: the arithmetic of one frame.
//
// A frame's tokens, ranked by score, fall into groups of nearly equal size. A group is drawn by its share of the
// softmax, floored and capped; then tokens inside it, without replacement, by weights within [1/2, 2] of uniform.
// What concerns tokens is float32 in the manner of gumbel.h, what concerns groups float64 in that of exact.h, sums
// are in fixed point: every backend draws the same.
#pragma once

#include "cacovid/exact.h"

namespace cacovid {

// What the host knows about a video before it sees a score.
struct CombinationPlan {
  int64_t frames;
  int64_t tokens_per_frame;
  int64_t num_draw;    // tokens that a combination takes from every frame
  int64_t num_groups;  // in [1, tokens_per_frame]
  double group_cap;    // most probability of a group
  int64_t num_frames;  // frames of a frame combination
};

// The first `remainder` groups hold one token more than the others.
CACOVID_HD int64_t group_start(const CombinationPlan& p, int64_t group) {
  const int64_t size = p.tokens_per_frame / p.num_groups, remainder = p.tokens_per_frame % p.num_groups;
  return group * size + (group < remainder ? group : remainder);
}

CACOVID_HD int64_t group_size(const CombinationPlan& p, int64_t group) {
  return p.tokens_per_frame / p.num_groups + (group < p.tokens_per_frame % p.num_groups ? 1 : 0);
}

// Groups that can be drawn when only the `valid` best tokens have a chance: those that hold `num_draw` of them.
// Because tokens are ranked these are the first ones. Without any, the first group gives what it has.
CACOVID_HD int64_t open_groups(const CombinationPlan& p, int64_t valid) {
  int64_t open = p.num_groups;
  while (open > 1 && group_start(p, open - 1) + p.num_draw > valid) --open;
  return open;
}

// The shares of one thread, in an array: `size` of them are read and written, so that it can be what a vector loop
// likes. Whoever holds shares otherwise has these functions, too.
struct ShareArray {
  double* share;
  int64_t size;

  CACOVID_HD double at(int64_t i) const { return share[i]; }
  CACOVID_HD void put(int64_t i, double x) const { share[i] = x; }
  // Makes the shares [first, n) at least `least` and returns their sum in fixed point.
  CACOVID_HD int64_t raise(int64_t first, int64_t n, double least) const {
    int64_t total = 0;
    for (int64_t i = 0; i < size; ++i) {
      const double raised = share[i] > least ? share[i] : least;
      const int64_t fixed = to_fixed(raised);
      const bool racing = i >= first && i < n;
      share[i] = racing ? raised : share[i];
      total += racing ? fixed : 0;
    }
    return total;
  }
  // Multiplies the shares [first, n); those from n on become 0.
  CACOVID_HD void finish(int64_t first, int64_t n, double scale) const {
    for (int64_t i = 0; i < size; ++i) share[i] = i < first ? share[i] : i < n ? share[i] * scale : 0.0;
  }
};

// Shares (of 1) that never rise from the first to the last become probabilities: none exceeds `cap` or falls below
// 1/n^2 of what is left for it. The largest is cut to the cap, the others are normalised again, and so on.
template <class Shares>
CACOVID_HD void cap_shares(const Shares& shares, int64_t n, double cap) {
  const double feasible = 1.0 / static_cast<double>(n), floor = feasible * feasible;
  cap = cap > feasible ? cap : feasible;
  double rest = 1.0, norm = 1.0;  // shares from `first` on are share / norm of rest
  int64_t first = 0, total = 0;
  for (;; ++first) {
    const double least = floor * norm;
    // The last share is the smallest: it says whether any is raised.
    if (first == 0 || shares.at(n - 1) < least) total = shares.raise(first, n, least);
    norm = from_fixed(total);
    cap = cap < 0.999 ? cap : 0.999;
    const double largest = shares.at(first);
    if (first == n - 1 || largest <= cap * norm) break;
    total -= to_fixed(largest);
    shares.put(first, cap * rest);
    rest = rest * (1.0 - cap);
    cap = cap / (1.0 - cap);
  }
  shares.finish(first, n, rest / norm);
}

// Shares as integers, and the one that 32 random bits fall on: the first whose running sum exceeds the threshold.
CACOVID_HD int64_t share_weight(double share) { return round_even_bits(share * 1073741824.0); }  // 2^30
CACOVID_HD int64_t share_threshold(uint32_t bits, int64_t total) {
  return static_cast<int64_t>(static_cast<uint64_t>(bits) * static_cast<uint64_t>(total) >> 32);
}

// A token's weight inside its group is e * weight_scale, clamped to [1/2, 2] of uniform: the published
// p / (p_group + 1e-8), where p = e / total and e = exp(score - best score of the frame).
CACOVID_HD float weight_scale(double group_share, double total) {
  return static_cast<float>(1.0 / (total * (group_share + 1e-8)));
}
CACOVID_HD float uniform_weight(const CombinationPlan& p) {
  return static_cast<float>(1.0 / static_cast<double>(p.tokens_per_frame / p.num_groups));
}
CACOVID_HD float clamped_weight(float scaled, float uniform) {
  const float least = 0.5f * uniform, most = 2.0f * uniform;
  const float raised = scaled < least ? least : scaled;
  return raised > most ? most : raised;
}

}  // namespace cacovid
