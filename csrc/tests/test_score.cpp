#include <cmath>

#include "data.h"

namespace cacovid::test {
namespace {

struct Pooled {
  std::vector<float> rrms, mean;
};

// The documented order of additions: sixteen lanes along a row; rows by fours, then one by one.
Pooled naive_pool(const RandomTensor& hidden, const std::vector<int64_t>& grid, float eps) {
  Pooled result;
  const int64_t columns = hidden.view.sizes[1];
  int64_t token = 0;
  for (size_t v = 0; v < grid.size() / 3; ++v) {
    const int64_t rows = grid[3 * v + 1] * grid[3 * v + 2];
    for (int64_t f = 0; f < grid[3 * v]; ++f, token += rows) {
      const auto at = [&](int64_t r, int64_t c) { return static_cast<float>(hidden.value((token + r) * columns + c)); };
      for (int64_t r = 0; r < rows; ++r) {
        float lanes[16] = {}, total = 0.0f;
        for (int64_t c = 0; c < columns; ++c) lanes[c % 16] += at(r, c) * at(r, c);
        for (const float lane : lanes) total += lane;
        result.rrms.push_back(1.0f / std::sqrt(total / static_cast<float>(columns) + eps));
      }
      for (int64_t c = 0; c < columns; ++c) {
        float sum = 0.0f;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) sum += (at(r, c) + at(r + 1, c)) + (at(r + 2, c) + at(r + 3, c));
        for (; r < rows; ++r) sum += at(r, c);
        result.mean.push_back(sum / static_cast<float>(rows));
      }
    }
  }
  return result;
}

struct Call {
  std::vector<int64_t> grid;
  int64_t frames = 0, tokens = 0, columns;
  RandomTensor hidden;

  Call(Random& random, Values values) : columns(random.size(0, 200)) {
    for (int64_t v = random.some(3); v > 0; --v) {
      grid.insert(grid.end(), {random.size(1, 20), random.size(1, 6), random.size(1, 6)});
      frames += grid[grid.size() - 3];
      tokens += grid[grid.size() - 3] * grid[grid.size() - 2] * grid[grid.size() - 1];
    }
    hidden = RandomTensor(random, random_score_type(random), {tokens, columns}, values);
  }
};

bool same(const Output<float>& out, const std::vector<float>& expected) {
  bool equal = out.size() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; equal && i < out.size(); ++i) equal = same_float(out[i], expected[i]);
  return equal;
}

TEST(pools_as_the_naive_implementation) {
  repeat(1500, [](Random& random) {
    const Call call(random, random_values(random));
    const float eps = random.pick({0.0f, 1e-6f, 1e-5f, 1.0f});
    const Pooled expected = naive_pool(call.hidden, call.grid, eps);
    for (const int threads : {1, 2, 3, 8}) {
      const Output<float> rrms(random, call.tokens), mean(random, call.frames * call.columns);
      cpu::frame_pool(call.hidden.view, call.grid.data(), static_cast<int64_t>(call.grid.size()) / 3, eps, threads,
                      rrms, mean);
      CHECK(same(rrms, expected.rrms));
      CHECK(same(mean, expected.mean));
    }
  });
}

TEST(is_close_to_the_exact_sums) {
  repeat(500, [](Random& random) {
    const Call call(random, Values::plain);
    const Output<float> rrms(random, call.tokens), mean(random, call.frames * call.columns);
    cpu::frame_pool(call.hidden.view, call.grid.data(), static_cast<int64_t>(call.grid.size()) / 3, 1e-6f, 2, rrms,
                    mean);
    for (int64_t n = 0; n < call.tokens && call.columns > 0; ++n) {
      double squares = 0.0;
      for (int64_t c = 0; c < call.columns; ++c) squares += std::pow(call.hidden.value(n * call.columns + c), 2);
      const double exact = 1.0 / std::sqrt(squares / static_cast<double>(call.columns) + 1e-6);
      CHECK(std::fabs(rrms[n] - exact) <= 2e-6 * exact);
    }
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
