#include "plackett_luce.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa/noise_loops.h"
#include "scratch.h"

namespace cacovid::cpu {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

double log_add(double a, double b) {
  const double larger = std::max(a, b), smaller = std::min(a, b);
  return larger == infinity || smaller == -infinity ? larger : larger + std::log1p(std::exp(smaller - larger));
}

// e^(log_part - log_total), where an infinite total leaves nothing to the finite parts.
double ratio(double log_part, double log_total) {
  return log_total == infinity || log_part == -infinity ? 0.0 : std::exp(log_part - log_total);
}

}  // namespace

struct PlackettLuce::Stages {
  int64_t count = 0;
  int64_t* item;      // who wins each stage
  double* weight;     // its weight, which open() took out of weights_
  double* log_total;  // [count + 1] ln of the weight still in the race; the last entry is that of the undrawn
};

PlackettLuce::PlackettLuce(const double* items, int64_t n, double* weights, uint8_t* marks)
    : items_(items), n_(n), weights_(weights), marks_(marks) {
  double lowest = infinity;
  top_ = -infinity;
  for (int64_t i = 0; i < n; ++i) {
    if (!(items[i] > -infinity)) continue;
    top_ = std::max(top_, items[i]);
    lowest = std::min(lowest, items[i]);
  }
  narrow_ = top_ < infinity && top_ - lowest <= 200.0;
  if (narrow_) noise_loops().exp_below(items, n, top_, weights);
}

bool PlackettLuce::open(const int64_t* drawn, int64_t k, Stages& s) {
  s.item = scratch<struct item_scratch, int64_t>(k);
  s.weight = scratch<struct weight_scratch, double>(k);
  s.log_total = scratch<struct total_scratch, double>(k + 1);
  bool possible = true;
  for (int64_t j = 0; j < k; ++j) {
    const int64_t i = drawn[j];
    if (i == -1) continue;
    if (i < 0 || i >= n_ || marks_[i] || !(items_[i] > -infinity)) {
      possible = false;
      continue;
    }
    marks_[i] = 1;
    s.item[s.count] = i;
    if (narrow_) {
      s.weight[s.count] = weights_[i];
      weights_[i] = 0.0;
    }
    ++s.count;
  }
  return possible;
}

void PlackettLuce::close(const Stages& s) {
  for (int64_t j = 0; j < s.count; ++j) {
    marks_[s.item[j]] = 0;
    if (narrow_) weights_[s.item[j]] = s.weight[j];
  }
}

double PlackettLuce::log_undrawn() const {
  if (narrow_) return top_ + std::log(noise_loops().sum(weights_, n_));
  double top = -infinity, total = 0.0;
  for (int64_t i = 0; i < n_; ++i) {
    if (!marks_[i] && items_[i] > top) top = items_[i];
  }
  if (!(std::fabs(top) < infinity)) return top;
  for (int64_t i = 0; i < n_; ++i) {
    if (!marks_[i] && items_[i] > -infinity) total += std::exp(items_[i] - top);
  }
  return top + std::log(total);
}

// use(i, weight of item i / e^log_total) for every item that is still in the race.
template <class Use>
void PlackettLuce::for_undrawn(double log_total, Use use) const {
  if (!(std::fabs(log_total) < infinity)) return;
  const double factor = narrow_ ? std::exp(top_ - log_total) : 0.0;
  for (int64_t i = 0; i < n_; ++i) {
    if (narrow_) {
      use(i, weights_[i] * factor);
    } else if (!marks_[i] && items_[i] > -infinity) {
      use(i, std::exp(items_[i] - log_total));
    }
  }
}

// From the last stage to the first the race only gains weight: nothing is ever subtracted.
bool PlackettLuce::find_totals(Stages& s) const {
  double remaining = narrow_ ? noise_loops().sum(weights_, n_) : 0.0;
  s.log_total[s.count] = log_undrawn();
  for (int64_t j = s.count - 1; j >= 0; --j) {
    const double item = items_[s.item[j]];
    if (narrow_) {
      remaining += s.weight[j];
      s.log_total[j] = top_ + std::log(remaining);
    } else {
      s.log_total[j] = log_add(s.log_total[j + 1], item);
      if (s.log_total[j] == infinity && item < infinity) return false;  // an item at +inf was passed over
    }
  }
  return true;
}

double PlackettLuce::log_prob(const int64_t* drawn, int64_t k) {
  Stages s;
  double result = 0.0;
  if (!open(drawn, k, s)) {
    result = -infinity;
    for (int64_t j = 0; j < k; ++j) {
      const bool inside = drawn[j] >= -1 && drawn[j] < n_;
      if (!inside || (drawn[j] >= 0 && std::isnan(items_[drawn[j]]))) result = nan;
    }
  } else if (narrow_) {
    // The logarithm of a product of a few totals costs less than a few logarithms.
    double remaining = noise_loops().sum(weights_, n_), product = 1.0;
    for (int64_t j = s.count - 1; j >= 0; --j) {
      remaining += s.weight[j];
      result += items_[s.item[j]] - top_;
      product *= remaining;
      if (!(product > 1e-100 && product < 1e100)) {
        result -= std::log(product);
        product = 1.0;
      }
    }
    result -= std::log(product);
  } else if (!find_totals(s)) {
    result = -infinity;
  } else {
    for (int64_t j = 0; j < s.count; ++j) {
      const double item = items_[s.item[j]];
      result += item == infinity ? 0.0 : item - s.log_total[j];
    }
  }
  close(s);
  return result;
}

// An item drawn at stage d, or never (d = the last stage), was in the race at stages 0 to d, and won stage j with
// probability e^(item - log_total[j]). These add up to e^(item - log_total[d]) * stays, where `stays` grows stage
// by stage, at most by 1: no term overflows, whatever the range of the logits.
void PlackettLuce::add_gradient(const int64_t* drawn, int64_t k, double scale, double* grad) {
  Stages s;
  if (open(drawn, k, s) && find_totals(s) && s.count > 0) {
    double stays = 0.0;
    for (int64_t j = 0; j < s.count; ++j) {
      const double total = s.log_total[j];
      if (total == infinity) continue;  // an item at +inf wins for sure
      stays = 1.0 + (j > 0 ? stays * ratio(total, s.log_total[j - 1]) : 0.0);
      grad[s.item[j]] += scale * (1.0 - ratio(items_[s.item[j]], total) * stays);
    }
    for_undrawn(s.log_total[s.count - 1], [&](int64_t i, double share) { grad[i] -= scale * stays * share; });
  }
  close(s);
}

// The same with the mean of `direction` over each stage's race: `mean` runs from the last stage to the first,
// `met` sums the means that an item has met, in the units of `stays`.
double PlackettLuce::add_second_gradient(const int64_t* drawn, int64_t k, double scale, const double* direction,
                                         double* grad) {
  Stages s;
  double result = 0.0;
  if (open(drawn, k, s) && find_totals(s) && s.count > 0) {
    double* mean = scratch<struct mean_scratch, double>(s.count);
    double below = 0.0;
    for_undrawn(s.log_total[s.count], [&](int64_t i, double share) { below += share * direction[i]; });
    for (int64_t j = s.count - 1; j >= 0; --j) {
      const int64_t i = s.item[j];
      const double total = s.log_total[j];
      below = ratio(items_[i], total) * direction[i] + below * ratio(s.log_total[j + 1], total);
      mean[j] = below;
      if (total < infinity) result += direction[i] - mean[j];
    }
    double stays = 0.0, met = 0.0;
    for (int64_t j = 0; j < s.count; ++j) {
      const int64_t i = s.item[j];
      const double total = s.log_total[j];
      if (total == infinity) continue;
      const double carry = j > 0 ? ratio(total, s.log_total[j - 1]) : 0.0;
      stays = 1.0 + stays * carry;
      met = mean[j] + met * carry;
      grad[i] -= scale * ratio(items_[i], total) * (direction[i] * stays - met);
    }
    for_undrawn(s.log_total[s.count - 1],
                [&](int64_t i, double share) { grad[i] -= scale * share * (direction[i] * stays - met); });
  }
  close(s);
  return result;
}

PlackettLuce distribution_of(const double* items, int64_t n) {
  uint8_t* marks = scratch<struct mark_scratch, uint8_t>(n);
  std::fill(marks, marks + n, uint8_t{0});
  return {items, n, scratch<struct exp_scratch, double>(n), marks};
}

}  // namespace cacovid::cpu
