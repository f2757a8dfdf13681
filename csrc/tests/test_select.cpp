#include <algorithm>
#include <numeric>

#include "cacovid/budget.h"
#include "cacovid/order.h"
#include "data.h"
#include "select_calls.h"

namespace cacovid::test {
namespace {

using Ints = std::vector<int64_t>;

// ---- the naive implementation -------------------------------------------------------------------

// a is ranked before b: by value, then -inf, then NaN; equals keep their order in a stable sort.
bool ranked_before(double a, double b) { return a != a ? false : b != b ? true : a > b; }

// Positions of the k best of n values, best first.
template <class Value>
Ints best(int64_t n, int64_t k, Value value) {
  Ints order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ranked_before(value(a), value(b)); });
  order.resize(static_cast<size_t>(k));
  return order;
}

int32_t flags_of(double x) { return (x != x ? status_nan : 0) | (x > 3.5e38 ? status_posinf : 0); }

// Shares by the softmax of the scaled scores; then one token at a time.
// Appends the status of every frame.
Ints naive_counts(const RandomTensor* scores, int64_t first, const BudgetPlan& p, std::vector<int32_t>& status) {
  std::vector<double> x(static_cast<size_t>(p.frames), 0.0);
  double largest = 0.0;
  for (int64_t f = 0; f < p.frames; ++f) {
    if (scores != nullptr) x[f] = scores->value(first + f);
    status.push_back(flags_of(x[f]));
    if (std::isfinite(x[f])) largest = std::max(largest, std::fabs(x[f]));
  }
  double top = -std::numeric_limits<double>::infinity();
  for (double& v : x) {
    if (std::isfinite(v))
      v = largest > 0.0 ? v / largest * 3.0 : 0.0;
    else
      v = v > 0.0 ? 3.0 : -std::numeric_limits<double>::infinity();
    top = std::max(top, v);
  }
  int64_t total = 0;
  for (double& v : x) {
    v = std::isfinite(top) ? exp_exact(v - top) : 1.0;
    total += to_fixed(v);
  }
  Ints counts;
  int64_t clipped = 0;
  for (const double v : x) {
    counts.push_back(to_fixed(std::min(std::max(v / from_fixed(total), p.weight_min), p.weight_max)));
    clipped += counts.back();
  }
  for (int64_t& c : counts) {
    const double share =
        std::nearbyint(static_cast<double>(c) * p.quota / static_cast<double>(std::max<int64_t>(clipped, 1)));
    c = std::min(std::max<int64_t>(static_cast<int64_t>(share), 1), p.cap);
  }
  int64_t sum = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  for (; sum > p.num_ranked; --sum) --*std::max_element(counts.begin(), counts.end());
  for (; sum < p.num_ranked; ++sum) ++*std::min_element(counts.begin(), counts.end());
  return counts;
}

// Rank j of the fill among `unranked` tokens: float32 linspace of the published code, or the nearest integer.
int64_t naive_rank(const BudgetPlan& p, int64_t j) {
  const int64_t picks = p.num_keep - p.num_ranked, last = p.frames * p.tokens_per_frame - p.num_ranked - 1;
  if (picks <= 1) return 0;
  if (p.float_ranks) {
    const float end = static_cast<float>(last), step = end / static_cast<float>(picks - 1);
    const float down = std::fma(-step, static_cast<float>(picks - 1 - j), end);
    const float at = j < picks / 2 ? step * static_cast<float>(j) : down;
    return static_cast<int64_t>(std::nearbyint(at));
  }
  int64_t nearest = j * last / (picks - 1) - 1, gap = last + 2;
  for (int64_t q = std::max<int64_t>(nearest, 0), i = 0; i < 4; ++i, ++q) {
    const int64_t distance = std::abs(q * (picks - 1) - j * last);
    if (distance < gap || (distance == gap && q % 2 == 0)) nearest = q, gap = distance;
  }
  return nearest;
}

struct Chosen {
  Ints indices, frame_counts;
  std::vector<int32_t> frame_status;
};

Chosen naive_select(const RandomTensor& tokens, const RandomTensor* frames, const std::vector<BudgetPlan>& plans,
                    bool by_score) {
  Chosen result;
  int64_t frame = 0, token = 0;
  for (const BudgetPlan& p : plans) {
    const Ints counts = naive_counts(frames, frame, p, result.frame_status);
    Ints kept, unranked;
    for (int64_t f = 0; f < p.frames; ++f) {
      const int64_t start = token + f * p.tokens_per_frame;
      const auto value = [&](int64_t i) { return tokens.value(start + i); };
      Ints ranked = best(p.tokens_per_frame, counts[f], value);
      std::sort(ranked.begin(), ranked.end());
      for (int64_t i = 0; i < p.tokens_per_frame; ++i) {
        result.frame_status[frame + f] |= flags_of(value(i));
        (std::binary_search(ranked.begin(), ranked.end(), i) ? kept : unranked).push_back(start + i);
      }
    }
    for (int64_t j = 0; j < p.num_keep - p.num_ranked; ++j) kept.push_back(unranked[naive_rank(p, j)]);
    std::sort(kept.begin(), kept.end());
    for (int64_t f = 0; f < p.frames; ++f) {
      const int64_t start = token + f * p.tokens_per_frame;
      const auto inside = [&](int64_t i) { return start <= i && i < start + p.tokens_per_frame; };
      result.frame_counts.push_back(std::count_if(kept.begin(), kept.end(), inside));
    }
    if (by_score) {
      std::stable_sort(kept.begin(), kept.end(),
                       [&](int64_t a, int64_t b) { return ranked_before(tokens.value(a), tokens.value(b)); });
    }
    result.indices.insert(result.indices.end(), kept.begin(), kept.end());
    frame += p.frames;
    token += p.frames * p.tokens_per_frame;
  }
  return result;
}

// ---- tests --------------------------------------------------------------------------------------

TEST(selects_as_the_naive_implementation) {
  repeat(1500, [](Random& random) {
    const SelectCall call(random, false);
    const bool by_score = random.chance(50);
    const Chosen expected =
        naive_select(call.token_scores, call.with_frames ? &call.frame_scores : nullptr, call.plans, by_score);
    for (const int threads : {1, 2, 3, 8}) {
      const Output<int64_t> indices(random, call.kept), counts(random, call.frames);
      const Output<int32_t> status(random, call.frames);
      cpu::select_tokens(call.token_scores.view, call.frame_view(), call.videos(), by_score, threads, indices, counts,
                         status);
      CHECK(indices.equals(expected.indices));
      CHECK(counts.equals(expected.frame_counts));
      CHECK(status.equals(expected.frame_status));
    }
  });
}

TEST(allocates_as_one_token_at_a_time) {
  repeat(2000, [](Random& random) {
    const SelectCall call(random, false);
    const Output<int64_t> counts(random, call.frames);
    const Output<int32_t> status(random, call.frames);
    cpu::allocate_budget(call.frame_view(), call.videos(), counts, status);
    int64_t frame = 0;
    std::vector<int32_t> flags;
    for (size_t v = 0; v < call.plans.size(); ++v) {
      const Ints expected = naive_counts(call.with_frames ? &call.frame_scores : nullptr, frame, call.plans[v], flags);
      CHECK(std::equal(expected.begin(), expected.end(), counts.data() + frame));
      frame += call.plans[v].frames;
    }
    CHECK(status.equals(flags));
  });
}

// Whatever the ratios: every budget is kept exactly, and every index is inside its video, once.
TEST(survives_any_ratio) {
  repeat(2000, [](Random& random) {
    const SelectCall call(random, true);
    const Output<int64_t> indices(random, call.kept), counts(random, call.frames);
    const Output<int32_t> status(random, call.frames);
    cpu::select_tokens(call.token_scores.view, call.frame_view(), call.videos(), false, 2, indices, counts, status);
    int64_t out = 0, token = 0, frame = 0;
    for (const BudgetPlan& p : call.plans) {
      CHECK(0 <= p.num_ranked && p.num_ranked <= p.num_keep);
      CHECK(0 <= p.cap && p.cap <= p.tokens_per_frame);
      const int64_t end = token + p.frames * p.tokens_per_frame;
      for (int64_t i = 0; i < p.num_keep; ++i) {
        CHECK((i == 0 ? token - 1 : indices[out + i - 1]) < indices[out + i] && indices[out + i] < end);
      }
      CHECK_EQ(std::accumulate(counts + frame, counts + frame + p.frames, int64_t{0}), p.num_keep);
      out += p.num_keep;
      frame += p.frames;
      token = end;
    }
  });
}

TEST(segmented_topk_is_a_stable_sort) {
  repeat(1500, [](Random& random) {
    const int64_t segments = random.some(40);
    const bool dense = random.chance(40) && segments > 0, by_score = random.chance(50);
    const int64_t width = random.size(0, 300);
    Ints offsets = {0}, k;
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t n = dense ? width : random.size(0, 300);
      offsets.push_back(offsets.back() + n);
      k.push_back(random.pick({int64_t{0}, std::min<int64_t>(n, 1), n, random.range(0, n), random.size(0, n)}));
    }
    const RandomTensor scores(random, random_score_type(random), dense ? Ints{segments, width} : Ints{offsets.back()},
                              random_values(random));
    Ints expected;
    std::vector<int32_t> flags;
    for (int64_t s = 0; s < segments; ++s) {
      const auto value = [&](int64_t i) { return scores.value(offsets[s] + i); };
      const int64_t n = offsets[s + 1] - offsets[s];
      Ints top = best(n, k[s], value);
      if (!by_score) std::sort(top.begin(), top.end());
      for (const int64_t i : top) expected.push_back(offsets[s] + i);
      flags.push_back(status_ok);
      for (int64_t i = 0; i < n; ++i) flags.back() |= flags_of(value(i));
    }
    for (const int threads : {1, 2, 3, 8}) {
      const Output<int64_t> indices(random, static_cast<int64_t>(expected.size()));
      const Output<int32_t> status(random, segments);
      cpu::segmented_topk(scores.view, offsets.data(), k.data(), segments, by_score, threads, indices, status);
      CHECK(indices.equals(expected));
      CHECK(status.equals(flags));
    }
  });
}

TEST(finds_the_best_of_a_long_row) {
  repeat(6, [](Random& random) {
    const int64_t n = random.range(100000, 200000), k = random.pick({int64_t{1}, n - 1, random.range(2, n - 2)});
    const RandomTensor scores(random, random_score_type(random), {n}, random_values(random));
    const Ints offsets = {0, n};
    Ints expected = best(n, k, [&](int64_t i) { return scores.value(i); });
    std::sort(expected.begin(), expected.end());
    const Output<int64_t> indices(random, k);
    const Output<int32_t> status(random, 1);
    cpu::segmented_topk(scores.view, offsets.data(), &k, 1, false, 2, indices, status);
    CHECK(indices.equals(expected));
  });
}

// The fill relies on it: ranks that repeat or fall would leave outputs unwritten.
TEST(fill_ranks_rise_strictly) {
  const auto check = [](const BudgetPlan& p) {
    const UniformFill fill(p);
    int64_t previous = -1;
    bool rising = true;
    for (int64_t j = 0; j < fill.count; ++j) {
      const int64_t rank = fill[j];
      rising = rising && previous < rank && rank < fill.unranked && rank == naive_rank(p, j);
      previous = rank;
    }
    CHECK(rising);
    for (const int64_t bound : {int64_t{0}, int64_t{1}, fill.unranked / 3, fill.unranked - 1, fill.unranked}) {
      int64_t below = 0;
      while (below < fill.count && fill[below] < bound) ++below;
      CHECK_EQ(fill.below(bound), below);
    }
  };
  const auto plan = [](int64_t tokens, double importance, int64_t keep, bool strict) {
    const double ratio = static_cast<double>(keep) / static_cast<double>(tokens);
    return plan_budget(1, 1, tokens, keep, {ratio, importance, 1.5 * ratio, strict, true});
  };
  for (int64_t tokens = 1; tokens <= 120 / slowdown; ++tokens) {
    for (int64_t keep = 1; keep <= tokens; ++keep) {
      for (const bool strict : {false, true}) {
        check(plan(tokens, 0.0, keep, strict));
        check(plan(tokens, 0.5, keep, strict));
      }
    }
  }
  repeat(30, [&](Random& random) {
    const int64_t tokens = random.size(100, 1 << 20), keep = random.range(1, tokens);
    check(plan(tokens, random.real(), keep, random.chance(30)));
  });
  // Around the limit of float32's integers, where its spacing is too coarse for ranks next to each other.
  for (const int64_t tokens : {int64_t{16777215}, int64_t{16777217}}) {
    for (const int64_t gap : {1, 1000}) {
      if (slowdown == 1) check(plan(tokens, 0.0, tokens - gap, false));
    }
  }
}

TEST(order_keys_rank_every_pair) {
  repeat(100000, [](Random& random) {
    float x[2];
    for (float& v : x) draw_value(random, reinterpret_cast<char*>(&v), DType::f32, random_values(random));
    const uint32_t a = order_key(x[0]), b = order_key(x[1]);
    CHECK_EQ(a > b, ranked_before(x[0], x[1]));
    CHECK_EQ(a == b, x[0] == x[1] || (x[0] != x[0] && x[1] != x[1]));
    CHECK_EQ(rank_index(rank_word(a, 77)), 77u);
    CHECK(rank_word(a, 5) > rank_word(a, 6));
  });
}

TEST(half_floats_load_exactly) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const double f16 = value_of_half(half, DType::f16), bf16 = value_of_half(half, DType::bf16);
    CHECK(same_float(load_float(f16_t{half}), static_cast<float>(f16)));
    CHECK(same_float(load_float(bf16_t{half}), static_cast<float>(bf16)));
  }
}

TEST(exp_is_exact_enough) {
  repeat(100000, [](Random& random) {
    const double x = -random.real() * random.pick({1e-9, 1.0, 6.0, 200.0, 699.0});
    const long double truth = std::exp(static_cast<long double>(x));
    CHECK(std::fabs(static_cast<long double>(exp_exact(x)) / truth - 1.0L) < 4e-16L);
  });
  for (const double x : {-701.0, -1e300, -std::numeric_limits<double>::infinity(), std::nan("")}) {
    CHECK_EQ(exp_exact(x), 0.0);
  }
  CHECK_EQ(exp_exact(0.0), 1.0);
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
