// The Gumbel transform over evenly spaced 32-bit inputs: the engine's bits are those of the emulated fma, finite,
// never rising, and near the true value. `test_gumbel 32` takes all 2^32 of them.
#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "cacovid/gumbel.h"
#include "cacovid/ops.h"

#if defined(__FMA__)
#error "this program checks hardware fma against the emulated one and must be built without it"
#endif

namespace {

constexpr uint64_t block = 1 << 14;

struct Report {
  uint64_t different = 0, rising = 0, not_finite = 0, checksum = 0;
  float least = INFINITY, most = -INFINITY;
  double error = 0.0;

  void add(const Report& other) {
    different += other.different;
    rising += other.rising;
    not_finite += other.not_finite;
    checksum += other.checksum;
    least = std::min(least, other.least);
    most = std::max(most, other.most);
    error = std::max(error, other.error);
  }
};

// The rounding of v to float32 belongs to the definition of the noise; the error is that of the logarithms.
double true_noise(uint32_t bits) {
  const float v = (static_cast<float>(std::min(bits, 0xFFFFFEFFu)) + 0.5f) * 0x1p-32f;
  return -std::log(-std::log1p(-static_cast<double>(v)));
}

Report check_block(uint64_t first, uint64_t step) {
  std::vector<uint32_t> bits(block + 1);
  std::vector<float> noise(block + 1);
  // One input before the block, so that no step between neighbours is left out.
  for (uint64_t i = 0; i <= block; ++i) bits[i] = static_cast<uint32_t>((first + i) * step - (first > 0 ? step : 0));
  cacovid::cpu::gumbel_noise(bits.data(), static_cast<int64_t>(block + 1), noise.data());
  Report r;
  for (uint64_t i = first > 0 ? 1 : 0; i < block + (first > 0 ? 1 : 0); ++i) {
    const uint32_t word = cacovid::float_to_bits(noise[i]);
    r.different += word != cacovid::float_to_bits(cacovid::gumbel_noise(bits[i]));
    r.not_finite += !std::isfinite(noise[i]);
    r.rising += i > 0 && noise[i] > noise[i - 1];
    r.checksum += static_cast<uint64_t>(word) * (2 * static_cast<uint64_t>(bits[i]) + 1);
    r.least = std::min(r.least, noise[i]);
    r.most = std::max(r.most, noise[i]);
    if (i % 64 == 0 || bits[i] < 4096) r.error = std::max(r.error, std::fabs(noise[i] - true_noise(bits[i])));
  }
  return r;
}

}  // namespace

int main(int argc, char** argv) {
  const int log_inputs = argc > 1 ? std::atoi(argv[1]) : 23;
  if (log_inputs < 14 || log_inputs > 32) {
    std::fprintf(stderr, "usage: test_gumbel [log2 of the number of inputs, 14 to 32]\n");
    return 2;
  }
  const uint64_t inputs = uint64_t{1} << log_inputs, step = (uint64_t{1} << 32) / inputs;
  Report all;
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t) {
    threads.emplace_back([&] {
      Report mine;
      for (uint64_t first; (first = next.fetch_add(block)) < inputs;) mine.add(check_block(first, step));
      const std::lock_guard<std::mutex> lock(mutex);
      all.add(mine);
    });
  }
  for (std::thread& thread : threads) thread.join();
  all.add(check_block(0, 1));                              // the largest noises
  all.add(check_block(((uint64_t{1} << 32) - block), 1));  // the smallest
  std::printf("%s: %" PRIu64 " inputs, range [%.6f, %.6f], error %.4g, checksum %016" PRIx64 "\n",
              cacovid::cpu::isa_name(), inputs, static_cast<double>(all.least), static_cast<double>(all.most),
              all.error, all.checksum);
  std::printf("different from the emulated fma %" PRIu64 ", not finite %" PRIu64 ", rising %" PRIu64 "\n",
              all.different, all.not_finite, all.rising);
  return all.different + all.not_finite + all.rising > 0 || all.error > 1.02e-6;
}
