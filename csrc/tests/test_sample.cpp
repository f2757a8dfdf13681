#include <algorithm>
#include <numeric>

#include "cacovid/gumbel.h"
#include "cacovid/order.h"
#include "cacovid/philox.h"
#include "op_calls.h"

namespace cacovid::test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// ---- noise --------------------------------------------------------------------------------------

// The known answers that Random123 publishes for Philox4x32-10.
TEST(philox_gives_the_published_words) {
  struct Known {
    PhiloxBlock counter;
    uint64_t key;
    PhiloxBlock words;
  };
  const Known known[] = {
      {{{0, 0, 0, 0}}, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{~0u, ~0u, ~0u, ~0u}}, ~uint64_t{0}, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       0x299f31d0a4093822u,
       {{0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u}}},
  };
  for (const Known& k : known) {
    const PhiloxBlock block = philox(k.counter, k.key);
    for (int i = 0; i < 4; ++i) CHECK_EQ(block.word[i], k.words.word[i]);
  }
}

TEST(emulated_fma_is_the_machine_s) {
  repeat(100000, [](Random& random) {
    float x[3];
    for (float& v : x) {
      v = random.chance(50)
              ? static_cast<float>(random.real() * 4.0 - 2.0)
              : static_cast<float>(std::ldexp(random.real() - 0.5, static_cast<int>(random.range(-40, 40))));
    }
    if (random.chance(30)) x[2] = -x[0] * x[1];  // cancellation
    if (random.chance(30)) {                     // just beside the middle of two floats, by less than float64 can tell
      const float tiny = std::ldexp(1.0f, -static_cast<int>(random.range(15, 23)));
      x[0] = 1.0f + tiny;
      x[1] = (random.chance(50) ? 0x1p-24f : -0x1p-24f) * (1.0f - tiny);
      x[2] = 1.0f + static_cast<float>(random.range(1, (1 << 23) - 1)) * 0x1p-23f;
    }
    CHECK(same_float(fma_emulated(x[0], x[1], x[2]), std::fma(x[0], x[1], x[2])));
  });
}

// v is rounded to float32 before the logarithms: the error is theirs alone.
TEST(noise_is_gumbel) {
  const auto check = [](uint32_t bits) {
    const float v = (static_cast<float>(std::min(bits, 0xfffffeffu)) + 0.5f) * 0x1p-32f;
    CHECK(std::fabs(gumbel_noise(bits) + std::log(-std::log1p(-static_cast<long double>(v)))) < 1.03e-6L);
  };
  repeat(100000, [&](Random& random) { check(static_cast<uint32_t>(random.next()) >> random.range(0, 31)); });
  for (const uint32_t bits : {0u, 1u, 0xfffffeffu, 0xffffff00u, 0xffffffffu}) check(bits);
  repeat(200, [](Random& random) {
    const int64_t n = random.size(0, 300);
    const Output<uint32_t> bits(random, n);
    const Output<float> noise(random, n);
    for (int64_t i = 0; i < n; ++i) bits[i] = static_cast<uint32_t>(random.next());
    cpu::gumbel_noise(bits, n, noise);
    for (int64_t i = 0; i < n; ++i) CHECK_EQ(float_bits(noise[i]), float_bits(gumbel_noise(bits[i])));
  });
}

// ---- the naive implementation -------------------------------------------------------------------

// ln P of an ordered draw: one softmax after another, each over what is left.
double naive_log_prob(const std::vector<double>& items, const std::vector<int64_t>& drawn) {
  const int64_t n = static_cast<int64_t>(items.size());
  std::vector<bool> gone(items.size());
  bool impossible = false, outside = false;
  long double result = 0.0L;
  for (const int64_t i : drawn) {
    if (i == -1) continue;
    if (i < 0 || i >= n || std::isnan(items[i])) {
      outside = true;
      continue;
    }
    if (gone[i] || items[i] == -infinity) {
      impossible = true;
      continue;
    }
    long double top = -infinity, total = 0.0L;
    for (int64_t j = 0; j < n; ++j) {
      if (!gone[j] && items[j] > top) top = items[j];
    }
    for (int64_t j = 0; j < n; ++j) {
      if (!gone[j] && items[j] > -infinity) total += top == items[j] ? 1.0L : std::exp(items[j] - top);
    }
    gone[i] = true;
    if (top == infinity)
      impossible = impossible || items[i] < infinity;
    else
      result += static_cast<long double>(items[i]) - top - std::log(total);
  }
  return outside ? std::nan("") : impossible ? -infinity : static_cast<double>(result);
}

bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b));
}

// Beyond this, ln of a total in float64 no longer tells how many equal items it holds.
bool moderate(const std::vector<double>& items) {
  return std::all_of(items.begin(), items.end(), [](double x) { return !std::isfinite(x) || std::fabs(x) < 1e4; });
}

std::vector<double> row_items(const RandomTensor& logits, int64_t row) {
  std::vector<double> items;
  for (int64_t i = 0; i < logits.view.sizes[1]; ++i) items.push_back(logits.value(row * logits.view.sizes[1] + i));
  return items;
}

// The k largest of score plus noise, the lower column first among equals; -inf and NaN have no chance.
std::vector<int64_t> naive_draw(const std::vector<double>& items, int64_t k, uint64_t seed, uint32_t row, uint32_t step,
                                uint32_t stream_sample) {
  std::vector<int64_t> order;
  std::vector<float> perturbed;
  for (size_t i = 0; i < items.size(); ++i) {
    const uint32_t bits = random_bits(seed, static_cast<uint32_t>(i), row, step, stream_sample);
    perturbed.push_back(static_cast<float>(items[i]) + gumbel_noise(bits));
    if (items[i] > -infinity) order.push_back(static_cast<int64_t>(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return perturbed[a] > perturbed[b]; });
  order.resize(static_cast<size_t>(k), -1);
  return order;
}

// ---- Gumbel top-k -------------------------------------------------------------------------------

TEST(draws_as_the_naive_implementation) {
  repeat(700, [](Random& random) {
    const int64_t rows = random.some(6), n = random.size(0, 200), samples = random.some(20);
    const int64_t k = random.pick({int64_t{0}, std::min<int64_t>(n, 1), n, random.range(0, n)});
    const RandomTensor logits(random, random_score_type(random), {rows, n}, random_values(random));
    const cpu::DrawKey key = random_key(random);
    std::vector<int64_t> expected;
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t r = 0; r < rows; ++r) {
        const std::vector<int64_t> drawn = naive_draw(row_items(logits, r), k, key.seed, static_cast<uint32_t>(r),
                                                      key.step, key.stream << 24 | static_cast<uint32_t>(s));
        expected.insert(expected.end(), drawn.begin(), drawn.end());
      }
    }
    std::vector<float> first;
    for (const int threads : {1, 2, 3, 8}) {
      const Output<int64_t> indices(random, samples * rows * k);
      const Output<float> log_prob(random, samples * rows);
      const Output<int32_t> status(random, rows);
      cpu::gumbel_topk(logits.view, k, samples, key, threads, indices, log_prob, status);
      CHECK(indices.equals(expected));
      if (threads == 1) first.assign(log_prob.data(), log_prob.data() + log_prob.size());
      for (int64_t i = 0; i < log_prob.size(); ++i) {
        CHECK(same_float(log_prob[i], first[i]));
        if (threads > 1) continue;
        const std::vector<int64_t> drawn(expected.begin() + i * k, expected.begin() + (i + 1) * k);
        const std::vector<double> items = row_items(logits, i % rows);
        CHECK(!moderate(items) || close(log_prob[i], naive_log_prob(items, drawn), 1e-6));
      }
      for (int64_t r = 0; r < rows; ++r) {
        int32_t flags = 0;
        int64_t valid = 0;
        for (const double x : row_items(logits, r)) {
          flags |= (std::isnan(x) ? status_nan : 0) | (x == infinity ? status_posinf : 0);
          valid += x > -infinity;
        }
        CHECK_EQ(status[r], flags | (valid < k ? status_short : 0));
      }
    }
  });
}

// ---- Plackett-Luce ------------------------------------------------------------------------------

struct DrawnCall {
  int64_t samples, rows, n, k;
  RandomTensor logits, indices;

  DrawnCall(Random& random, bool proper)
      : samples(random.some(5)),
        rows(random.size(1, 4)),
        n(random.size(1, 40)),
        k(random.size(0, std::min<int64_t>(n, 12))) {
    const DType dtype = random.pick({DType::f32, DType::bf16, DType::f16, DType::f64});
    const Values values = proper ? random.pick({Values::plain, Values::ties}) : random_values(random);
    logits = RandomTensor(random, dtype, {rows, n}, values);
    indices = RandomTensor(random, DType::i64, {samples, rows, k}, Values::bits, Strides::distinct);
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<int64_t> order(static_cast<size_t>(n));
        std::iota(order.begin(), order.end(), 0);
        for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[random.range(0, i)]);
        for (int64_t j = 0; j < k; ++j) {
          int64_t item = order[j];
          if (random.chance(proper ? 0 : 8))
            item = random.pick({int64_t{-1}, int64_t{-1}, int64_t{0}, n, -n, int64_t{1} << 40});
          std::memcpy(const_cast<char*>(indices.at((s * rows + r) * k + j)), &item, sizeof item);
        }
      }
    }
  }
  std::vector<int64_t> drawn(int64_t s, int64_t r) const {
    std::vector<int64_t> result;
    for (int64_t j = 0; j < k; ++j) result.push_back(load<int64_t>(indices.at((s * rows + r) * k + j)));
    return result;
  }
};

TEST(log_prob_is_a_chain_of_softmaxes) {
  repeat(700, [](Random& random) {
    const DrawnCall call(random, false);
    const Output<double> log_prob(random, call.samples * call.rows);
    cpu::pl_log_prob(call.logits.view, call.indices.view, static_cast<int>(random.range(1, 3)), log_prob);
    for (int64_t i = 0; i < log_prob.size(); ++i) {
      const int64_t s = i / call.rows, r = i % call.rows;
      const std::vector<double> items = row_items(call.logits, r);
      CHECK(!moderate(items) || close(log_prob[i], naive_log_prob(items, call.drawn(s, r)), 1e-11));
    }
  });
}

// First and second derivatives stage by stage: d ln P / d x = [drawn] - p, and - (diag(p) - p p') beyond.
TEST(gradients_are_those_of_the_softmaxes) {
  repeat(700, [](Random& random) {
    const DrawnCall call(random, true);
    const int64_t n = call.n;
    const Output<double> grad(random, call.samples * call.rows), direction(random, call.rows * n);
    for (int64_t i = 0; i < grad.size(); ++i) grad[i] = random.real() - 0.5;
    for (int64_t i = 0; i < direction.size(); ++i) direction[i] = random.real() - 0.5;
    std::vector<double> first(static_cast<size_t>(call.rows * n)), second = first,
                                                                   along(static_cast<size_t>(grad.size()));
    for (int64_t i = 0; i < grad.size(); ++i) {
      const int64_t s = i / call.rows, r = i % call.rows;
      const std::vector<double> items = row_items(call.logits, r);
      std::vector<double> p(items.size());
      for (size_t j = 0; j < p.size(); ++j) p[j] = std::exp(items[j]);
      const double* u = direction + r * n;
      for (const int64_t drawn : call.drawn(s, r)) {
        const double total = std::accumulate(p.begin(), p.end(), 0.0);
        double mean = 0.0;
        for (int64_t j = 0; j < n; ++j) mean += p[j] / total * u[j];
        for (int64_t j = 0; j < n; ++j) {
          first[r * n + j] += grad[i] * ((j == drawn) - p[j] / total);
          second[r * n + j] -= grad[i] * p[j] / total * (u[j] - mean);
        }
        along[i] += u[drawn] - mean;
        p[drawn] = 0.0;
      }
    }
    const int threads = static_cast<int>(random.range(1, 3));
    const Output<double> grad_logits(random, call.rows * n), grad_grad(random, grad.size());
    cpu::pl_log_prob_backward(grad, call.logits.view, call.indices.view, threads, grad_logits);
    for (int64_t j = 0; j < grad_logits.size(); ++j) CHECK(close(grad_logits[j], first[j], 1e-10));
    cpu::pl_log_prob_double_backward(direction, grad, call.logits.view, call.indices.view, threads, grad_grad,
                                     grad_logits);
    for (int64_t j = 0; j < grad_logits.size(); ++j) CHECK(close(grad_logits[j], second[j], 1e-10));
    for (int64_t j = 0; j < grad_grad.size(); ++j) CHECK(close(grad_grad[j], along[j], 1e-10));
  });
}

// Values and indices that make no sense leave no NaN behind where the probability is zero or undefined.
TEST(gradients_survive_any_draw) {
  repeat(1000, [](Random& random) {
    const DrawnCall call(random, false);
    const Output<double> grad(random, call.samples * call.rows), direction(random, call.rows * call.n);
    std::fill_n(grad.data(), grad.size(), 1.0);
    std::fill_n(direction.data(), direction.size(), 1.0);
    const Output<double> grad_logits(random, call.rows * call.n), grad_grad(random, grad.size());
    cpu::pl_log_prob_backward(grad, call.logits.view, call.indices.view, 2, grad_logits);
    for (int64_t j = 0; j < grad_logits.size(); ++j) CHECK(std::isfinite(grad_logits[j]));
    cpu::pl_log_prob_double_backward(direction, grad, call.logits.view, call.indices.view, 2, grad_grad, grad_logits);
    for (int64_t j = 0; j < grad_logits.size(); ++j) CHECK(std::isfinite(grad_logits[j]));
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
