// The Plackett-Luce distribution over the ordered draws from one row of logits.
#pragma once

#include <cstdint>

namespace cacovid::cpu {

// One row of logits, with what all of its draws share. An item with logit -inf or NaN has probability zero;
// items at +inf come before all others, in any order among themselves.
class PlackettLuce {
 public:
  // `items` stays in use; `weights` (n doubles) and `marks` (n bytes, all zero) are scratch of the same lifetime.
  PlackettLuce(const double* items, int64_t n, double* weights, uint8_t* marks);

  // ln of the probability that a race of the items is won by drawn[0], then drawn[1], ... Entries of -1 are
  // padding. NaN if an index is outside the row or its logit is NaN, -inf if a draw is impossible.
  double log_prob(const int64_t* drawn, int64_t k);

  // Adds scale * d log_prob / d items to grad[n]; nothing where log_prob is not finite.
  void add_gradient(const int64_t* drawn, int64_t k, double scale, double* grad);

  // With u = scale * d log_prob / d items: adds d (direction . u) / d items to grad[n] and returns
  // d (direction . u) / d scale.
  double add_second_gradient(const int64_t* drawn, int64_t k, double scale, const double* direction, double* grad);

 private:
  // A draw as stages: who wins each, and ln of the weight still in the race before it.
  struct Stages;
  bool open(const int64_t* drawn, int64_t k, Stages& stages);
  void close(const Stages& stages);
  bool find_totals(Stages& stages) const;
  double log_undrawn() const;
  template <class Use>
  void for_undrawn(double log_total, Use use) const;

  const double* items_;
  int64_t n_;
  double* weights_;  // e^(item - top), 0 while an item is drawn
  uint8_t* marks_;
  double top_;
  bool narrow_;  // finite items lie within 200 of each other and nothing is +inf: sums of weights are safe
};

// The distribution of a row with this thread's scratch: one at a time.
PlackettLuce distribution_of(const double* items, int64_t n);

}  // namespace cacovid::cpu
