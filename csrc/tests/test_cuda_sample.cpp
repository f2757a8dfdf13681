// Gumbel top-k as a CUDA kernel, on the machine of simt/: the draws of the CPU engine, in memory closed to the host.
#include "cacovid/cuda.h"
#include "device.h"
#include "op_calls.h"

namespace cacovid::test {
namespace {

void check(Random& random, int64_t rows, int64_t n, int64_t k, int64_t samples, Values values) {
  const RandomTensor logits(random, random_score_type(random), {rows, n}, values);
  const DeviceTensor there(logits);
  std::vector<int64_t> indices(static_cast<size_t>(samples * rows * k));
  std::vector<float> log_prob(static_cast<size_t>(samples * rows));
  std::vector<int32_t> status(static_cast<size_t>(rows));
  const DeviceBytes indices_there(samples * rows * k * 8), log_prob_there(samples * rows * 4), status_there(rows * 4);
  const int64_t added_steps = random.chance(50) ? 0 : static_cast<int64_t>(random.next());
  const DeviceBytes step(8, &added_steps);
  cpu::DrawKey key = random_key(random);
  const int64_t launches = simt::launches();
  CHECK_EQ(cuda::gumbel_topk(there.view, k, samples, key, step.as<int64_t>(), indices_there.as<int64_t>(),
                             log_prob_there.as<float>(), status_there.as<int32_t>(), {}),
           0);
  CHECK_EQ(simt::launches() - launches, rows > 0 ? 1 : 0);
  key.step += static_cast<uint32_t>(added_steps);
  cpu::gumbel_topk(logits.view, k, samples, key, 1, indices.data(), log_prob.data(), status.data());
  const auto bytes_of = [](const void* data, size_t bytes) {
    return std::vector<char>(static_cast<const char*>(data), static_cast<const char*>(data) + bytes);
  };
  CHECK(indices_there.read() == bytes_of(indices.data(), indices.size() * 8));
  CHECK(status_there.read() == bytes_of(status.data(), status.size() * 4));
  const std::vector<char> found = log_prob_there.read();
  for (size_t i = 0; i < log_prob.size(); ++i) {
    const double a = static_cast<double>(log_prob[i]), b = static_cast<double>(load<float>(found.data() + 4 * i));
    CHECK(values == Values::bits || values == Values::odd || std::fabs(a - b) <= 3e-6 + 1e-5 * std::fabs(a));
  }
}

// Values of 3e38 beside others have log-probabilities that the engine's logarithms of totals do not resolve.
TEST(draws_from_short_rows) {
  repeat(120, [](Random& random) {
    const int64_t n = random.size(0, 150);
    const Values values = random.pick({Values::plain, Values::ties, Values::odd, Values::bits});
    check(random, random.size(0, 3), n, random.range(0, n), random.range(0, 3), values);
  });
}

TEST(draws_from_long_rows) {
  int64_t seed = 1;
  for (const int64_t n : {1025, 1500, 8193}) {
    for (const Values values : {Values::plain, Values::ties}) {
      Random random(static_cast<uint64_t>(seed++));
      if (slowdown > 1 && n > 1500) continue;
      check(random, 1, n, random.pick({1, 40, 300}), 1, values);
    }
  }
}

TEST(draws_more_than_are_sorted_at_once) {
  Random random(9);
  check(random, 1, 2200, slowdown > 1 ? 2060 : 2150, 1, Values::ties);
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
