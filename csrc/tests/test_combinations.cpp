#include <algorithm>
#include <map>
#include <numeric>

#include "op_calls.h"

namespace cacovid::test {
namespace {

using Ints = std::vector<int64_t>;

// Positions of the scores, best first; -inf, then NaN at the end.
Ints ranked(const RandomTensor& scores, int64_t first, int64_t count) {
  Ints order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), first);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const double x = scores.value(a), y = scores.value(b);
    return x != x ? false : y != y ? true : x > y;
  });
  return order;
}

int64_t count_chances(const RandomTensor& scores, const Ints& order) {
  return std::count_if(order.begin(), order.end(),
                       [&](int64_t i) { return scores.value(i) > -std::numeric_limits<double>::infinity(); });
}

struct Call {
  std::vector<CombinationPlan> plans;
  int64_t videos, frames = 0, tokens = 0, drawn = 0, drawn_frames = 0;
  RandomTensor scores, frame_scores;
  cpu::CombinationSamples samples;
  cpu::DrawKey key;

  Call(Random& random, int64_t most_samples) : videos(random.some(3)) {
    for (int64_t v = 0; v < videos; ++v) {
      CombinationPlan p = {};
      p.frames = random.size(1, 12);
      p.tokens_per_frame = random.size(1, 300);
      p.num_groups = random.size(1, p.tokens_per_frame);
      p.num_draw = random.range(0, p.tokens_per_frame / p.num_groups);
      p.group_cap = random.chance(50) ? std::min(2.0 / static_cast<double>(p.num_groups), 1.0) : random.real() + 1e-9;
      p.num_frames = random.range(0, p.frames);
      plans.push_back(p);
      frames += p.frames;
      tokens += p.frames * p.tokens_per_frame;
      drawn += p.frames * p.num_draw;
      drawn_frames += p.num_frames;
    }
    scores = RandomTensor(random, random_score_type(random), {tokens}, random_values(random));
    frame_scores = RandomTensor(random, random_score_type(random), {frames}, random_values(random));
    samples = {random.range(1, most_samples), random.size(0, 30), random.chance(50)};
    key = random_key(random);
  }
};

struct Result {
  Output<int64_t> indices, groups;
  Output<float> log_prob;
  Output<int64_t> frame_indices;
  Output<float> frame_log_prob;
  Output<int32_t> frame_status, frame_draw_status;

  Result(Random& random, const Call& c, cpu::CombinationSamples samples, int threads)
      : indices(random, samples.tokens * c.drawn),
        groups(random, samples.tokens * c.frames),
        log_prob(random, samples.tokens * c.frames),
        frame_indices(random, samples.frames * c.drawn_frames),
        frame_log_prob(random, samples.frames * c.videos),
        frame_status(random, c.frames),
        frame_draw_status(random, samples.frames > 0 ? c.videos : 0) {
    cpu::sample_combinations(
        c.scores.view, c.frame_scores.view, c.plans.data(), c.videos, samples, c.key, threads,
        {indices, groups, log_prob, frame_indices, frame_log_prob, frame_status, frame_draw_status});
  }
};

// `drawn`: ascending and distinct positions, all among order[low, high), -1 behind where `found` < k.
bool well_drawn(const int64_t* drawn, int64_t k, const Ints& order, int64_t low, int64_t high, int64_t found) {
  bool right = true;
  for (int64_t j = 0; j < k; ++j) {
    if (j >= found) {
      right = right && drawn[j] == -1;
      continue;
    }
    right = right && (j == 0 || drawn[j - 1] < drawn[j]);
    right = right && std::find(order.begin() + low, order.begin() + high, drawn[j]) != order.begin() + high;
  }
  return right;
}

TEST(combinations_hold_one_group_of_every_frame) {
  repeat(600, [](Random& random) {
    const Call c(random, 40);
    const Result r(random, c, c.samples, static_cast<int>(random.range(1, 4)));
    int64_t frame = 0, token = 0, column = 0;
    for (const CombinationPlan& p : c.plans) {
      for (int64_t f = 0; f < p.frames; ++f, ++frame, token += p.tokens_per_frame, column += p.num_draw) {
        const Ints order = ranked(c.scores, token, p.tokens_per_frame);
        const int64_t valid = count_chances(c.scores, order), best = std::min(valid, p.num_draw);
        for (int64_t s = 0; s < c.samples.tokens; ++s) {
          const int64_t* drawn = r.indices + s * c.drawn + column;
          const int64_t group = r.groups[s * c.frames + frame];
          const float log_prob = r.log_prob[s * c.frames + frame];
          if (s == 0) {
            CHECK(group == -1 && log_prob == 0.0f);
            CHECK(well_drawn(drawn, p.num_draw, order, 0, best, best));
            continue;
          }
          CHECK(0 <= group && group < open_groups(p, valid));
          const int64_t low = group_start(p, group), high = std::min(group_start(p, group + 1), valid);
          CHECK(
              well_drawn(drawn, p.num_draw, order, low, high, std::min(p.num_draw, std::max<int64_t>(high - low, 0))));
          CHECK(std::isfinite(log_prob) && log_prob < 1e-5f);
        }
      }
    }
  });
}

TEST(frame_combinations_hold_frames_of_every_video) {
  repeat(600, [](Random& random) {
    const Call c(random, 2);
    const Result r(random, c, c.samples, 2);
    int64_t frame = 0, column = 0, token = 0;
    for (int64_t v = 0; v < c.videos; ++v) {
      const CombinationPlan& p = c.plans[v];
      const Ints order = ranked(c.frame_scores, frame, p.frames);
      const int64_t valid = count_chances(c.frame_scores, order), found = std::min(valid, p.num_frames);
      for (int64_t s = 0; s < c.samples.frames; ++s) {
        const int64_t* drawn = r.frame_indices + s * c.drawn_frames + column;
        CHECK(well_drawn(drawn, p.num_frames, order, 0, s == 0 ? found : valid, found));
        CHECK(s > 0 || r.frame_log_prob[v] == 0.0f);
        CHECK(std::isfinite(r.frame_log_prob[s * c.videos + v]) && r.frame_log_prob[s * c.videos + v] < 1e-5f);
      }
      int32_t draw_flags = valid < p.num_frames ? status_short : 0;
      for (int64_t f = 0; f < p.frames; ++f, ++frame, token += p.tokens_per_frame) {
        const Ints tokens = ranked(c.scores, token, p.tokens_per_frame);
        int32_t flags = count_chances(c.scores, tokens) < p.num_draw ? status_short : 0;
        for (const int64_t i : tokens) {
          flags |= (std::isnan(c.scores.value(i)) ? status_nan : 0) | (c.scores.value(i) > 3.5e38 ? status_posinf : 0);
        }
        CHECK_EQ(r.frame_status[frame], flags);
        const double x = c.frame_scores.value(frame);
        draw_flags |= (std::isnan(x) ? status_nan : 0) | (x > 3.5e38 ? status_posinf : 0);
      }
      if (c.samples.frames > 0) CHECK_EQ(r.frame_draw_status[v], draw_flags);
      column += p.num_frames;
    }
  });
}

// A sample is a function of its number alone: more samples, more threads, the same first ones.
TEST(samples_do_not_depend_on_each_other) {
  repeat(200, [](Random& random) {
    const Call c(random, 600);
    const Result all(random, c, c.samples, 1);
    const cpu::CombinationSamples fewer = {random.range(1, c.samples.tokens), std::min<int64_t>(c.samples.frames, 3),
                                           c.samples.strict};
    for (const int threads : {1, 2, 3, 8}) {
      const Result some(random, c, fewer, threads);
      CHECK(std::equal(some.indices.data(), some.indices.data() + some.indices.size(), all.indices.data()));
      CHECK(std::equal(some.groups.data(), some.groups.data() + some.groups.size(), all.groups.data()));
      CHECK(std::equal(some.log_prob.data(), some.log_prob.data() + some.log_prob.size(), all.log_prob.data()));
      CHECK((!c.samples.strict && c.samples.frames != fewer.frames) ||
            std::equal(some.frame_indices.data(), some.frame_indices.data() + some.frame_indices.size(),
                       all.frame_indices.data()));
    }
  });
}

// With nothing to draw from it, log_prob is a group's own: groups come as often as it says.
TEST(groups_come_as_often_as_they_say) {
  repeat(12, [](Random& random) {
    const int64_t samples = 6001;
    const CombinationPlan plan = {1, random.range(8, 64), 0, random.range(2, 8), 0.1 + random.real() * 0.9, 0};
    const RandomTensor scores(random, DType::f32, {plan.tokens_per_frame}, Values::plain);
    const Output<int64_t> none(random, 0), groups(random, samples);
    const Output<float> log_prob(random, samples), no_frames(random, 0);
    const Output<int32_t> status(random, 1), no_status(random, 0);
    cpu::sample_combinations(scores.view, Tensor{}, &plan, 1, {samples, 0, false}, {random.next(), 0, 0}, 2,
                             {none, groups, log_prob, none, no_frames, status, no_status});
    std::map<int64_t, std::pair<double, double>> seen;  // probability, count
    for (int64_t s = 1; s < samples; ++s) {
      std::pair<double, double>& g = seen[groups[s]];
      g.first = std::exp(static_cast<double>(log_prob[s]));
      g.second += 1.0;
    }
    double total = 0.0;
    for (const auto& [group, g] : seen) {
      const double expected = g.first * static_cast<double>(samples - 1);
      CHECK(std::fabs(g.second - expected) < 6.0 * std::sqrt(expected) + 1.0);
      total += g.first;
    }
    CHECK(static_cast<int64_t>(seen.size()) < plan.num_groups || std::fabs(total - 1.0) < 1e-5);
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
