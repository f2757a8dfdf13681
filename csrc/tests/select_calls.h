// Random calls of allocate_budget and select_tokens.
#pragma once

#include "cacovid/budget.h"
#include "data.h"

namespace cacovid::test {

// `hostile`: ratios that make no sense, as nothing but their shapes is checked on the way to the core.
struct SelectCall {
  std::vector<BudgetPlan> plans;
  int64_t frames = 0, tokens = 0, kept = 0;
  RandomTensor token_scores, frame_scores;
  bool with_frames;

  SelectCall(Random& random, bool hostile) {
    const int64_t videos = random.chance(4) ? 0 : random.size(1, 5);
    const int shape = static_cast<int>(random.range(1, 3));
    int64_t t = random.size(1, 40), h = random.size(1, 16), w = random.size(1, 16);
    const auto ratio = [&] { return hostile && random.chance(40) ? hostile_number(random) : random.real(); };
    BudgetOptions options = {1.0, random.pick({0.0, 0.5, 1.0, ratio()}), 1.0, random.chance(50), random.chance(70)};
    if (hostile && random.chance(30)) options.importance_ratio = hostile_number(random);
    for (int64_t v = 0; v < (shape == 2 ? std::min<int64_t>(videos, 1) : videos); ++v) {
      if (shape == 1) t = random.size(1, 40), h = random.size(1, 16), w = random.size(1, 16);
      options.keep_ratio = random.chance(10) ? 1.0 : std::max(ratio(), 1e-3);
      options.max_frame_ratio = random.chance(60) ? 1.5 * options.keep_ratio : hostile ? ratio() : 0.01 + random.real();
      const bool by_ratio = random.chance(60) && options.keep_ratio <= 1.0;
      const double all = static_cast<double>(t * h * w);
      int64_t keep = by_ratio ? static_cast<int64_t>(options.keep_ratio * all) : random.range(0, t * h * w);
      if (!by_ratio && !hostile) options.keep_ratio = std::max(static_cast<double>(keep), 1.0) / all;
      plans.push_back(plan_budget(t, h, w, std::max<int64_t>(keep, 0), options));
      frames += t;
      tokens += t * h * w;
      kept += plans.back().num_keep;
    }
    const int64_t count = static_cast<int64_t>(plans.size());
    const DType token_type = random_score_type(random);
    const Values values = random_values(random);
    if (shape == 3 && count > 0)
      token_scores = RandomTensor(random, token_type, {count, t, h * w}, values);
    else if (shape == 2 && count > 0)
      token_scores = RandomTensor(random, token_type, {t, h * w}, values);
    else
      token_scores = RandomTensor(random, token_type, {tokens}, values);
    with_frames = random.chance(75);
    if (!with_frames) return;
    const bool dense = shape == 3 && random.chance(50);
    frame_scores =
        RandomTensor(random, random_score_type(random),
                     dense ? std::vector<int64_t>{count, t} : std::vector<int64_t>{frames}, random_values(random));
  }

  static double hostile_number(Random& random) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    return random.pick({0.0, -1.0, 1e-300, 5e-324, 1e17, 1e300, -1e300, inf, -inf, std::nan(""), 2.0, 1.0 + 1e-15});
  }
  cpu::Videos videos() const { return {plans.data(), static_cast<int64_t>(plans.size())}; }
  Tensor frame_view() const { return with_frames ? frame_scores.view : Tensor{}; }
};

}  // namespace cacovid::test
