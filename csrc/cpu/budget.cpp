#include "cacovid/budget.h"

#include <algorithm>

#include "cacovid/ops.h"
#include "isa/noise_loops.h"
#include "rows.h"
#include "scratch.h"

namespace cacovid::cpu {
namespace {

struct logit_scratch;

// Scores scaled to [-3, 3], the largest magnitude to 3; -inf and NaN to -inf. Returns the largest.
double frame_logits(const Tensor& scores, int64_t first, int64_t frames, double* logits, int32_t* status) {
  std::fill_n(status, frames, static_cast<int32_t>(status_ok));
  if (!scores.defined()) {
    std::fill_n(logits, frames, 0.0);
    return 0.0;
  }
  double largest = 0.0;
  for (int64_t f = 0; f < frames; ++f) {
    const double x = element_of(scores, first + f);
    const double magnitude = std::fabs(x);
    if (x != x) status[f] = status_nan;
    if (x == infinite_score) status[f] = status_posinf;
    if (magnitude < infinite_score) largest = std::max(largest, magnitude);
    logits[f] = x;
  }
  double top = no_chance;
  for (int64_t f = 0; f < frames; ++f) {
    logits[f] = frame_logit(logits[f], largest);
    top = std::max(top, logits[f]);
  }
  return top;
}

// Softmax of the frame logits, clipped, in fixed point. Returns the sum of the weights.
int64_t frame_weights(const Tensor& scores, int64_t first, const BudgetPlan& p, int64_t* weights, int32_t* status) {
  double* e = scratch<logit_scratch, double>(p.frames);
  const double top = frame_logits(scores, first, p.frames, e, status);
  if (top == no_chance) std::fill_n(e, p.frames, 0.0);  // no score to go by: all frames alike
  noise_loops().exp_below(e, p.frames, top == no_chance ? 0.0 : top, e);
  int64_t total = 0;
  for (int64_t f = 0; f < p.frames; ++f) total += to_fixed(e[f]);
  const double norm = from_fixed(total);
  int64_t clipped = 0;
  for (int64_t f = 0; f < p.frames; ++f) {
    weights[f] = frame_weight(e[f], norm, p.weight_min, p.weight_max);
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

void allocate_budget(Tensor frame_scores, Videos videos, int64_t* counts, int32_t* frame_status) {
  int64_t first = 0;
  for (int64_t v = 0; v < videos.count; ++v) {
    const BudgetPlan& p = videos.plans[v];
    int64_t* c = counts + first;
    const int64_t weight = frame_weights(frame_scores, first, p, c, frame_status + first);
    int64_t total = 0;
    for (int64_t f = 0; f < p.frames; ++f) {
      c[f] = frame_share(c[f], weight, p.quota, p.cap);
      total += c[f];
    }
    if (total != p.num_ranked) level(c, p.frames, p.num_ranked - total, p.tokens_per_frame);
    first += p.frames;
  }
}

}  // namespace cacovid::cpu
