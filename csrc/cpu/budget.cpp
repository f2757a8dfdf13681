#include "cacovid/budget.h"

#include <algorithm>
#include <limits>

#include "cacovid/ops.h"
#include "rows.h"
#include "scratch.h"

namespace cacovid::cpu {
namespace {

struct weight_scratch;

// Softmax of the scores scaled to [-3, 3], clipped, in fixed point. Returns the sum of the weights.
int64_t frame_weights(const Tensor& scores, int64_t first, const BudgetPlan& p, int64_t* weights, int32_t& status) {
  float largest = 0.0f;
  if (scores.defined()) {
    for (int64_t f = 0; f < p.frames; ++f) {
      const float x = element_of(scores, first + f);
      const float magnitude = std::fabs(x);
      if (x != x) status |= status_nan;
      if (x == std::numeric_limits<float>::infinity()) status |= status_posinf;
      if (magnitude <= std::numeric_limits<float>::max()) largest = std::max(largest, magnitude);
    }
  }
  const auto logit = [&](int64_t f) {  // 0 where every finite score is 0: the published code divides by zero there
    const float x = scores.defined() ? element_of(scores, first + f) : 0.0f;
    if (x == std::numeric_limits<float>::infinity()) return 3.0;
    if (!(std::fabs(x) <= std::numeric_limits<float>::max())) return -std::numeric_limits<double>::infinity();
    return largest > 0.0f ? static_cast<double>(x) / static_cast<double>(largest) * 3.0 : 0.0;
  };
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t f = 0; f < p.frames; ++f) top = std::max(top, logit(f));
  int64_t total = 0;
  double* e = scratch<weight_scratch, double>(p.frames);
  for (int64_t f = 0; f < p.frames; ++f) {
    e[f] = top >= -3.0 ? exp_exact(logit(f) - top) : 1.0;  // no finite score at all: uniform
    total += to_fixed(e[f]);
  }
  const double norm = from_fixed(total);
  int64_t clipped = 0;
  for (int64_t f = 0; f < p.frames; ++f) {
    weights[f] = to_fixed(std::min(std::max(e[f] / norm, p.weight_min), p.weight_max));
    clipped += weights[f];
  }
  return clipped;
}

// Tokens to take off (raise = false) or add (true) so that the largest counts come down, or the smallest
// go up, one at a time, the first frame first among equals: found as a water level instead of a loop.
void level(int64_t* counts, int64_t frames, int64_t missing, int64_t tokens_per_frame) {
  const bool raise = missing > 0;
  const int64_t need = raise ? missing : -missing;
  const auto volume = [&](int64_t water) {
    int64_t sum = 0;
    for (int64_t f = 0; f < frames; ++f) {
      sum += std::max<int64_t>(raise ? water - counts[f] : counts[f] - water, 0);
    }
    return sum;
  };
  int64_t inside = raise ? 0 : tokens_per_frame;  // volume(inside) <= need < volume(outside)
  int64_t outside = raise ? tokens_per_frame + 1 : -1;
  while (inside - outside > 1 || outside - inside > 1) {
    const int64_t middle = (inside + outside) / 2;
    (volume(middle) <= need ? inside : outside) = middle;
  }
  int64_t rest = need - volume(inside);
  for (int64_t f = 0; f < frames; ++f) {
    counts[f] = raise ? std::max(counts[f], inside) : std::min(counts[f], inside);
    if (rest > 0 && counts[f] == inside) {
      counts[f] += raise ? 1 : -1;
      --rest;
    }
  }
}

}  // namespace

void allocate_budget(Tensor frame_scores, Videos videos, int64_t* counts, int32_t* status) {
  int64_t first = 0;
  for (int64_t v = 0; v < videos.count; ++v) {
    const BudgetPlan& p = videos.plans[v];
    status[v] = status_ok;
    int64_t* c = counts + first;
    const int64_t weight = frame_weights(frame_scores, first, p, c, status[v]);
    const double norm = static_cast<double>(std::max<int64_t>(weight, 1));
    int64_t total = 0;
    for (int64_t f = 0; f < p.frames; ++f) {
      const double share = round_even(static_cast<double>(c[f]) * p.quota / norm);
      c[f] = std::min<int64_t>(std::max<int64_t>(static_cast<int64_t>(share), 1), p.cap);
      total += c[f];
    }
    if (total != p.num_ranked) level(c, p.frames, p.num_ranked - total, p.tokens_per_frame);
    first += p.frames;
  }
}

}  // namespace cacovid::cpu
