#include <cmath>

#include "cacovid/policy_loss.h"
#include "data.h"

namespace cacovid::test {
namespace {

int64_t words_of(int64_t tokens) { return (tokens + 31) / 32; }

// ---- arithmetic ---------------------------------------------------------------------------------

TEST(exponentials_above_zero_and_logarithms) {
  for (int i = 0; i <= 70000; ++i) {
    const double x = i * 0.01, exact = std::exp(x);
    CHECK(std::fabs(exp_exact(x) - exact) <= 6e-16 * exact);
  }
  for (int i = 0; i <= 100000; ++i) {
    const double x = i < 1000 ? std::ldexp(1.0, -i) : i * 1e-5, exact = std::log1p(x);
    CHECK(std::fabs(log_1p_exact(x) - exact) <= 6e-16 * exact);
  }
  const double inf = std::numeric_limits<double>::infinity();
  CHECK(std::isnan(scaled_exp(std::nan(""), 1.0)));
  CHECK_EQ(scaled_exp(inf, 1.0), scaled_exp(700.0, 1.0));
  CHECK(std::isfinite(scaled_exp(inf, 2.0)));
  CHECK_EQ(scaled_exp(-inf, 2.0), 0.0);
}

// ---- masks --------------------------------------------------------------------------------------

TEST(packs_as_bit_by_bit) {
  repeat(1500, [](Random& random) {
    const int64_t rows = random.size(0, 6), n = random.size(0, 300);
    const DType dtype = random.pick({DType::b8, DType::u8, DType::i8, DType::i16, DType::i32, DType::i64});
    const RandomTensor masks(random, dtype, {rows, n}, Values::bits);
    const int64_t item = item_size(dtype);
    if (random.chance(70)) {  // random bytes are rarely zero
      for (int64_t at = 0; at < masks.memory.bytes(); at += item) {
        if (random.chance(60)) std::memset(masks.memory.data() + at, 0, static_cast<size_t>(item));
      }
    }
    const Output<int32_t> words(random, rows * words_of(n));
    cpu::pack_masks(masks.view, random.pick({1, 3}), words);
    std::vector<uint32_t> expected(static_cast<size_t>(words.size()), 0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        uint64_t bits = 0;
        std::memcpy(&bits, masks.at(r * n + i), static_cast<size_t>(item));
        if (bits != 0) expected[r * words_of(n) + i / 32] |= 1u << i % 32;
      }
    }
    CHECK(words.equals(std::vector<int32_t>(expected.begin(), expected.end())));
  });
}

TEST(packs_positions) {
  repeat(1500, [](Random& random) {
    const int64_t rows = random.size(0, 6), k = random.size(0, 40), n = random.size(1, 200);
    const RandomTensor indices(random, DType::i64, {rows, k}, Values::bits);
    for (int64_t at = 0; at < indices.memory.bytes(); at += 8) {
      const int64_t index = random.range(-2, n + 1);
      if (random.chance(90)) std::memcpy(indices.memory.data() + at, &index, sizeof index);
    }
    const Output<int32_t> words(random, rows * words_of(n));
    cpu::pack_indices(indices.view, n, random.pick({1, 3}), words);
    std::vector<uint32_t> expected(static_cast<size_t>(words.size()), 0);
    for (int64_t j = 0; j < rows * k; ++j) {
      const int64_t index = load<int64_t>(indices.at(j));
      if (index >= 0 && index < n) expected[j / k * words_of(n) + index / 32] |= 1u << index % 32;
    }
    CHECK(words.equals(std::vector<int32_t>(expected.begin(), expected.end())));
  });
}

// ---- sums ---------------------------------------------------------------------------------------

struct Batch {
  int64_t videos, combinations, tokens;
  bool balanced;
  std::vector<int32_t> words;
  RandomTensor rewards;

  Batch(Random& random, Values values)
      : videos(random.size(1, 3)),
        combinations(random.size(1, 80)),
        tokens(random.size(1, 200)),
        balanced(random.chance(60)),
        rewards(random, random.pick({DType::f32, DType::bf16, DType::f16, DType::f64}), {videos, combinations},
                values) {
    const int64_t rare = random.range(0, 3);  // of set bits
    for (int64_t i = 0; i < videos * combinations * words_of(tokens); ++i) {
      uint64_t word = random.next();
      for (int64_t j = 0; j < rare; ++j) word &= random.next();
      words.push_back(random.chance(5) ? (random.chance(50) ? 0 : -1) : static_cast<int32_t>(word));
    }
  }
  bool keeps(int64_t video, int64_t g, int64_t token) const {
    const int64_t row = video * combinations + g;
    return (static_cast<uint32_t>(words[row * words_of(tokens) + token / 32]) >> token % 32 & 1u) != 0;
  }
  std::vector<double> sums(Random& random, int threads) const {
    const Output<double> out(random, videos * policy_sums_rows * tokens);
    cpu::policy_sums(words.data(), rewards.view, tokens, balanced, true, threads, out);
    return {out.data(), out.data() + out.size()};
  }
};

// In the order that policy_loss.h states, from the formula of the weights.
std::vector<double> naive_sums(const Batch& b) {
  std::vector<double> sums(static_cast<size_t>(b.videos * policy_sums_rows * b.tokens), 0.0);
  const auto lane_sum = [&](auto value) {
    double lanes[32] = {};
    for (int64_t g = 0; g < b.combinations; ++g) lanes[g % 32] += value(g);
    for (int half = 16; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    return lanes[0];
  };
  const double n = static_cast<double>(b.tokens), groups = static_cast<double>(b.combinations);
  for (int64_t v = 0; v < b.videos; ++v) {
    const auto reward = [&](int64_t g) { return b.rewards.value(v * b.combinations + g); };
    const double mean = lane_sum(reward) / groups;
    const double squares = lane_sum([&](int64_t g) { return (reward(g) - mean) * (reward(g) - mean); });
    const double deviation = std::sqrt(squares / std::max(groups - 1.0, 1.0));
    for (int64_t g = 0; g < b.combinations; ++g) {
      const double advantage = (reward(g) - mean) / (deviation + 1e-4);
      double count = 0.0;
      for (int64_t i = 0; i < b.tokens; ++i) count += b.keeps(v, g, i) ? 1.0 : 0.0;
      const double share = count / n, total = (count * (1.0 - share) + (n - count) * share + 1e-7) * groups;
      for (int64_t i = 0; i < b.tokens; ++i) {
        const bool kept = b.keeps(v, g, i);
        const double weight = !b.balanced ? 1.0 / (n * groups) : (kept ? 1.0 - share : share) / total;
        double* of_token = sums.data() + v * policy_sums_rows * b.tokens + i;
        of_token[((kept ? 0 : 2) + (advantage > 0.0 ? 0 : 1)) * b.tokens] += weight * advantage;
        of_token[(kept ? 4 : 5) * b.tokens] += weight;
      }
    }
  }
  return sums;
}

bool same_doubles(const std::vector<double>& a, const std::vector<double>& b) {
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i) {
    same = std::memcmp(&a[i], &b[i], sizeof a[i]) == 0 || (a[i] != a[i] && b[i] != b[i]);
  }
  return same;
}

TEST(sums_have_the_bits_of_the_naive_ones) {
  repeat(600, [](Random& random) {
    const Batch b(random, random_values(random));
    const std::vector<double> expected = naive_sums(b);
    for (const int threads : {1, 3}) CHECK(same_doubles(b.sums(random, threads), expected));
  });
}

// ---- loss ---------------------------------------------------------------------------------------

struct Naive {
  double loss, gradient;
};

// ln P and its derivative by the log-odds, straight from the definition.
Naive naive_term(double odds, double old_odds, const double* s, int64_t step, PolicyRule rule) {
  const auto log_p = [](double x) { return x > 0.0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x)); };
  Naive result = {0.0, 0.0};
  for (const int action : {0, 1}) {
    const double sign = action == 0 ? 1.0 : -1.0, now = log_p(sign * odds),
                 ratio = std::exp(now - log_p(sign * old_odds));
    const double better = s[2 * action * step], worse = s[(2 * action + 1) * step], weight = s[(4 + action) * step];
    result.loss -= better * std::min(ratio, rule.high) + worse * std::max(ratio, rule.low);
    double by_log_p = -(ratio <= rule.high ? better * ratio : 0.0) - (ratio >= rule.low ? worse * ratio : 0.0);
    const double d = std::log(0.5) - now;
    result.loss += rule.kl_weight * weight * (std::exp(d) - d - 1.0);
    by_log_p += rule.kl_weight * weight * (1.0 - std::exp(d));
    result.gradient += by_log_p * sign * std::exp(log_p(-sign * odds));
  }
  return result;
}

TEST(loss_and_gradient_are_those_of_the_formula) {
  repeat(600, [](Random& random) {
    const int64_t videos = random.size(1, 3), n = random.size(1, 1300);
    const auto logits_of = [&](DType dtype) {
      const std::vector<int64_t> pairs = {videos, n, 2}, singles = {videos, n};
      return RandomTensor(random, dtype, random.chance(50) ? pairs : singles, Values::plain);
    };
    const auto dtype = [&] { return random.pick({DType::f32, DType::bf16, DType::f16, DType::f64}); };
    const RandomTensor now = logits_of(dtype()), old = logits_of(dtype());
    const auto odds = [&](const RandomTensor& x, int64_t i) {
      return x.view.ndim == 2 ? x.value(i) : x.value(2 * i + 1) - x.value(2 * i);
    };
    std::vector<double> sums;
    for (int64_t i = 0; i < videos * policy_sums_rows * n; ++i) sums.push_back(random.real() - 0.5);
    const PolicyRule rule = {1.0 - random.real(), 1.0 + random.real(), random.chance(50) ? 0.0 : random.real()};
    const bool wide = now.view.dtype == DType::f64, pairs = now.view.ndim == 3;

    double expected = 0.0;
    std::vector<double> gradients;
    for (int64_t i = 0; i < videos * n; ++i) {
      const double* of_token = sums.data() + i / n * policy_sums_rows * n + i % n;
      const Naive term = naive_term(odds(now, i), odds(old, i), of_token, n, rule);
      expected += term.loss / static_cast<double>(videos);
      if (pairs) gradients.push_back(-term.gradient / static_cast<double>(videos));
      gradients.push_back(term.gradient / static_cast<double>(videos));
    }
    std::vector<char> first;
    for (const int threads : {1, 3}) {
      const int64_t item = wide ? 8 : 4, count = static_cast<int64_t>(gradients.size());
      const Output<char> loss(random, item, item), gradient(random, count * item, item);
      cpu::policy_loss(now.view, old.view, sums.data(), rule, threads, loss.data(), gradient.data());
      const DType dtype_out = wide ? DType::f64 : DType::f32;
      const double accuracy = wide ? 1e-12 : 2e-7;
      CHECK(std::fabs(value_of(loss.data(), dtype_out) - expected) <= accuracy * static_cast<double>(n) + 1e-7);
      for (int64_t i = 0; i < count; ++i) {
        CHECK(std::fabs(value_of(gradient.data() + i * item, dtype_out) - gradients[i]) <=
              accuracy * (1.0 + std::fabs(gradients[i])));
      }
      std::vector<char> bytes(loss.data(), loss.data() + item);
      bytes.insert(bytes.end(), gradient.data(), gradient.data() + count * item);
      if (first.empty()) first = bytes;
      CHECK(first == bytes);  // for any number of threads
    }
  });
}

TEST(odd_values_are_safe) {
  repeat(300, [](Random& random) {
    const int64_t n = random.size(1, 700);
    const RandomTensor now(random, random.pick({DType::f32, DType::f64}), {1, n}, Values::bits);
    const RandomTensor old(random, random.pick({DType::bf16, DType::f16}), {1, n, 2}, Values::bits);
    const RandomTensor sums(random, DType::f64, {policy_sums_rows, n}, Values::bits, Strides::contiguous);
    const int64_t item = item_size(now.view.dtype);
    const Output<char> loss(random, item, item), gradient(random, n * item, item);
    cpu::policy_loss(now.view, old.view, sums.view.as<double>(), {0.8, 1.28, 0.1}, 2, loss.data(), gradient.data());
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) nan = nan || std::isnan(now.value(i));
    CHECK(!nan || std::isnan(value_of(loss.data(), now.view.dtype)));
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
