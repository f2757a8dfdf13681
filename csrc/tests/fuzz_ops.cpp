// Feeds every op with whatever random bytes decode to. Without arguments for two seconds; `fuzz_ops 600 7` for ten
// minutes from seed 7. Built with -fsanitize=fuzzer -DCACOVID_LIBFUZZER it is a libFuzzer target instead.
#include <chrono>

#include "op_calls.h"

namespace cacovid::test {
namespace {

// One thread or several: the same bits.
void run_input(const uint8_t* data, size_t size) {
  Random random(data, size);
  const OpCall call = random_call(random);
  CHECK_EQ(call(1), call(3));
}

int drive(double seconds, uint64_t seed) {
  const auto start = std::chrono::steady_clock::now();
  int64_t inputs = 0;
  uint8_t bytes[4096];
  for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++inputs) {
    current_seed = seed + static_cast<uint64_t>(inputs);
    Random random(current_seed);
    const int64_t size = random.size(0, sizeof bytes);
    for (int64_t i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(random.chance(20) ? 0 : random.next());
    run_input(bytes, static_cast<size_t>(size));
    if (tally().failures > 0) break;
  }
  std::printf("%lld inputs, %lld failures, %s\n", static_cast<long long>(inputs),
              static_cast<long long>(tally().failures.load()), cpu::isa_name());
  return tally().failures == 0 && inputs > 0 ? 0 : 1;
}

}  // namespace
}  // namespace cacovid::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  cacovid::test::run_input(data, size);
  if (cacovid::test::tally().failures > 0) std::abort();
  return 0;
}

#if !defined(CACOVID_LIBFUZZER)
int main(int argc, char** argv) {
  return cacovid::test::drive(argc > 1 ? std::atof(argv[1]) : 2.0, argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
}
#endif
