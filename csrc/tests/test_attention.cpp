#include <cmath>

#include "data.h"

namespace cacovid::test {
namespace {

struct Call {
  int64_t batch, heads, key_heads, rows, count, columns;
  RandomTensor query, keys, mask, positions;
  cpu::AttentionRule rule;

  Call(Random& random, Values values) {
    batch = random.some(3);
    key_heads = random.size(1, 4);
    heads = key_heads * random.size(1, 7);
    rows = random.some(9);
    count = random.size(0, 150);
    columns = random.size(1, 70);
    const DType dtype = random_score_type(random);
    query = RandomTensor(random, dtype, {batch, heads, rows, columns}, values);
    keys = RandomTensor(random, dtype, {batch, key_heads, count, columns}, values);
    if (random.chance(50)) {
      mask = RandomTensor(random, DType::b8, {batch, count}, Values::bits, Strides::distinct);
      for (int64_t i = 0; i < mask.memory.bytes(); ++i) mask.memory.data()[i] = random.chance(70);
    }
    if (random.chance(50)) {
      positions = RandomTensor(random, DType::i64, {batch, rows}, Values::bits, Strides::distinct);
      for (int64_t i = 0; i < positions.memory.bytes() / 8; ++i) {
        const int64_t last = random.chance(90) ? random.range(-1, count) : static_cast<int64_t>(random.next());
        std::memcpy(positions.memory.data() + 8 * i, &last, sizeof last);
      }
    }
    rule = {static_cast<float>(random.real()), random.chance(50)};
  }

  int64_t size() const { return batch * count * (rule.per_head ? key_heads : 1); }
  void run(int threads, float* scores) const {
    cpu::attention_scores(query.view, keys.view, mask.view, positions.view, rule, threads, scores);
  }
  bool sees(int64_t b, int64_t r, int64_t j) const {
    if (mask.view.defined() && *mask.at(b * count + j) == 0) return false;
    return !positions.view.defined() || j <= load<int64_t>(positions.at(b * rows + r));
  }

  // In float64, one row after another.
  std::vector<double> naive() const {
    const int64_t out_heads = rule.per_head ? key_heads : 1, group = heads / key_heads;
    std::vector<double> scores(static_cast<size_t>(size()), 0.0), weight(static_cast<size_t>(count));
    for (int64_t b = 0; b < batch; ++b) {
      int64_t live = 0;
      for (int64_t r = 0; r < rows; ++r) {
        bool any = false;
        for (int64_t j = 0; j < count; ++j) any = any || sees(b, r, j);
        live += any;
        for (int64_t h = 0; any && h < heads; ++h) {
          double top = -HUGE_VAL, total = 0.0;
          for (int64_t j = 0; j < count; ++j) {
            double x = 0.0;
            for (int64_t c = 0; c < columns; ++c) {
              x += query.value(((b * heads + h) * rows + r) * columns + c) *
                   keys.value(((b * key_heads + h / group) * count + j) * columns + c);
            }
            weight[j] = sees(b, r, j) ? x * static_cast<double>(rule.scale) : -HUGE_VAL;
            top = std::max(top, weight[j]);
          }
          for (double& w : weight) total += w = std::exp(w - top);
          const int64_t out = b * out_heads + (rule.per_head ? h / group : 0);
          for (int64_t j = 0; j < count; ++j) scores[out * count + j] += weight[j] / total;
        }
      }
      for (int64_t i = 0; i < out_heads * count; ++i) {
        scores[b * out_heads * count + i] /= static_cast<double>(std::max<int64_t>(live, 1) * heads / out_heads);
      }
    }
    return scores;
  }
};

TEST(is_close_to_float64) {
  repeat(600, [](Random& random) {
    const Call call(random, Values::plain);
    const Output<float> scores(random, call.size());
    call.run(1, scores);
    const std::vector<double> expected = call.naive();
    for (int64_t i = 0; i < call.size(); ++i) {
      CHECK(std::fabs(static_cast<double>(scores[i]) - expected[static_cast<size_t>(i)]) <=
            2e-5 * expected[static_cast<size_t>(i)] + 1e-9);
    }
  });
}

TEST(threads_change_no_bit_of_any_values) {
  repeat(600, [](Random& random) {
    const Call call(random, random_values(random));
    const Output<float> alone(random, call.size());
    call.run(1, alone);
    for (const int threads : {2, 3, 8}) {
      const Output<float> shared(random, call.size());
      call.run(threads, shared);
      for (int64_t i = 0; i < call.size(); ++i) CHECK(same_float(alone[i], shared[i]));
    }
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
