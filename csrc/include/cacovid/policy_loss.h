// The loss of a policy with two actions per token, keep and drop. Over G combinations of one video, each token's share
// of loss and gradient is linear in six sums of weights and weighted advantages. They are fixed while a batch of
// combinations is optimised, so that a step costs no more than one look at each token.
//
// Everything is float64 add, multiply, divide, square root and bit casts in a stated order: the same bits everywhere.
#pragma once

#include "cacovid/exact.h"

namespace cacovid {

// Rows of the sums [6, N] of one video: over the combinations that keep (or drop) token i, in ascending order, from +0.
enum PolicySum : int32_t {
  kept_better,     // weight * advantage, where the advantage is above zero
  kept_worse,      // the same of all other advantages, NaN among them
  dropped_better,  //
  dropped_worse,   //
  kept_weight,     // weight
  dropped_weight,  //
  policy_sums_rows
};

// Rewards are added up in 32 running sums, number g to sum g % 32; then the upper half of the sums is added to the
// lower half until one is left.
constexpr int64_t reward_lanes = 32;

// Of one combination's tokens. Balanced: tokens kept by a combination that keeps few weigh more than those it drops.
struct PolicyWeights {
  double kept, dropped;
};
CACOVID_HD PolicyWeights policy_weights(int64_t count, int64_t tokens, int64_t combinations, bool balanced) {
  const double n = static_cast<double>(tokens), g = static_cast<double>(combinations);
  if (!balanced) return {1.0 / (n * g), 1.0 / (n * g)};
  const double kept = static_cast<double>(count), share = kept / n;
  const double total = (kept * (1.0 - share) + (n - kept) * share + 1e-7) * g;
  return {(1.0 - share) / total, share / total};
}

// The reward in units of the group's standard deviation.
CACOVID_HD double policy_advantage(double reward, double mean, double deviation) {
  return (reward - mean) / (deviation + 1e-4);
}

// The square of the sample standard deviation from the sum of squared distances to the mean.
CACOVID_HD double reward_variance(double squares, int64_t combinations) {
  return combinations > 1 ? squares / static_cast<double>(combinations - 1) : squares;
}

// ln(1 + x) for x in [0, 1]: 2 artanh(x / (2 + x)), relative error below 4e-16.
CACOVID_HD double log_1p_exact(double x) {
  const double s = x / (2.0 + x), t = s * s;
  double p = 1.0 / 33.0;
  p = p * t + 1.0 / 31.0;
  p = p * t + 1.0 / 29.0;
  p = p * t + 1.0 / 27.0;
  p = p * t + 1.0 / 25.0;
  p = p * t + 1.0 / 23.0;
  p = p * t + 1.0 / 21.0;
  p = p * t + 1.0 / 19.0;
  p = p * t + 1.0 / 17.0;
  p = p * t + 1.0 / 15.0;
  p = p * t + 1.0 / 13.0;
  p = p * t + 1.0 / 11.0;
  p = p * t + 1.0 / 9.0;
  p = p * t + 1.0 / 7.0;
  p = p * t + 1.0 / 5.0;
  p = p * t + 1.0 / 3.0;
  p = p * t + 1.0;
  return 2.0 * s * p;
}

// Ratios below `low` or above `high` earn nothing more.
struct PolicyRule {
  double low, high, kl_weight;
};

struct PolicyTerm {
  double loss, gradient;  // of one token; by its log-odds
};

// factor * e^x of any x, NaN too. Above 700 it stays at factor * e^700: an infinite ratio would make NaN of a sum of no
// combinations. (exp_exact is as exact up to there.)
CACOVID_HD double scaled_exp(double x, double factor) {
  const double scaled = factor * exp_exact(x > 700.0 ? 700.0 : x);
  return x == x ? scaled : x;
}

// What the tokens of one action add: sums of better and worse combinations at the ratio of new to old probability.
// The published loss is -min(r A, clip(r) A), the gradient by the logarithm of the probability.
CACOVID_HD PolicyTerm clipped_term(double ratio, double better, double worse, const PolicyRule& rule) {
  const double high = ratio > rule.high ? rule.high : ratio, low = ratio < rule.low ? rule.low : ratio;
  const double moved_up = ratio > rule.high ? 0.0 : ratio, moved_down = ratio < rule.low ? 0.0 : ratio;
  return {-(better * high + worse * low), -(better * moved_up + worse * moved_down)};
}

// KL to a fair coin by the estimator e^d - d - 1, d = ln 0.5 - ln p.
CACOVID_HD PolicyTerm divergence_term(double half_by_p, double log_p, double weight) {
  half_by_p = half_by_p > 1e300 ? 1e300 : half_by_p;
  log_p = log_p < -1e200 ? -1e200 : log_p;  // far less than half_by_p then is
  return {weight * (half_by_p + 0.6931471805599453 + log_p - 1.0), weight * (1.0 - half_by_p)};
}

// `odds` and `old_odds` are the logarithms of P(keep) / P(drop) now and when the combinations were drawn.
template <bool WithDivergence>
CACOVID_HD PolicyTerm policy_term(double odds, double old_odds, const double (&sums)[policy_sums_rows],
                                  const PolicyRule& rule) {
  // ln P(keep) = min(odds, 0) - ln(1 + tail), ln P(drop) = min(-odds, 0) - ln(1 + tail): no overflow, no cancellation.
  const double tail = exp_exact(odds < 0.0 ? odds : -odds);
  const double total = 1.0 + tail, larger = 1.0 / total, smaller = tail * larger;  // probabilities
  PolicyTerm more_kept = {}, more_dropped = {};
  if constexpr (WithDivergence) {
    const double ln_kept = odds > 0.0 ? 0.0 : odds, ln_dropped = odds < 0.0 ? 0.0 : -odds;
    const double half_by_larger = 0.5 * total, half_by_smaller = half_by_larger / tail, log_total = log_1p_exact(tail);
    more_kept = divergence_term(odds > 0.0 ? half_by_larger : half_by_smaller, ln_kept - log_total,
                                rule.kl_weight * sums[kept_weight]);
    more_dropped = divergence_term(odds > 0.0 ? half_by_smaller : half_by_larger, ln_dropped - log_total,
                                   rule.kl_weight * sums[dropped_weight]);
  }
  // `rare`: the log-odds of the action that was the less likely one. The ratio of the other needs no exponential.
  const bool keeping_was_likely = old_odds > 0.0;
  const double rare = keeping_was_likely ? -odds : odds, old_rare = keeping_was_likely ? -old_odds : old_odds;
  const double shared = (1.0 + exp_exact(old_rare)) * larger;
  const double rare_ratio = scaled_exp((rare > 0.0 ? 0.0 : rare) - old_rare, shared);
  const double likely_ratio = shared * (rare > 0.0 ? tail : 1.0);
  PolicyTerm kept =
      clipped_term(keeping_was_likely ? likely_ratio : rare_ratio, sums[kept_better], sums[kept_worse], rule);
  PolicyTerm dropped =
      clipped_term(keeping_was_likely ? rare_ratio : likely_ratio, sums[dropped_better], sums[dropped_worse], rule);
  if constexpr (WithDivergence) {
    kept = {kept.loss + more_kept.loss, kept.gradient + more_kept.gradient};
    dropped = {dropped.loss + more_dropped.loss, dropped.gradient + more_dropped.gradient};
  }
  const double p_kept = odds > 0.0 ? larger : smaller, p_dropped = odds > 0.0 ? smaller : larger;
  return {kept.loss + dropped.loss, kept.gradient * p_dropped - dropped.gradient * p_kept};
}

}  // namespace cacovid
