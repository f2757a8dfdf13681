#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <thread>

#include "op_calls.h"

namespace cacovid::test {
namespace {

// Many threads call many ops at once, each of which wants the pool.
TEST(ops_run_side_by_side) {
  repeat(6 * slowdown, [](Random& random) {
    std::vector<OpCall> calls;
    std::vector<uint64_t> digests;
    for (int i = 0; i < 300; ++i) {
      calls.push_back(random_call(random));
      digests.push_back(calls.back()(1));
    }
    std::vector<std::thread> callers;
    for (size_t t = 0; t < 6; ++t) {
      callers.emplace_back([&, t] {
        for (size_t i = 0; i < calls.size(); ++i) {
          const size_t at = (i * 7 + t * 50) % calls.size();
          CHECK_EQ(calls[at](3), digests[at]);
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  });
}

// Threads that come and go take their scratch with them.
TEST(short_lived_threads_call_ops) {
  repeat(60 * slowdown, [](Random& random) {
    const OpCall call = random_call(random);
    const uint64_t digest = call(1);
    std::thread([&] { CHECK_EQ(call(2), digest); }).join();
  });
}

#if defined(__SSE2__)
// A caller that flushes subnormal numbers to zero (torch.set_flush_denormal) has them flushed by every thread.
TEST(helpers_round_as_the_caller) {
  repeat(1500 * slowdown, [](Random& random) {
    const OpCall call = random_call(random);
    const unsigned int state = _mm_getcsr();
    _mm_setcsr(state | 0x8040u);  // flush results and operands
    const uint64_t alone = call(1), shared = call(4);
    _mm_setcsr(state);
    CHECK_EQ(alone, shared);
    CHECK_EQ(call(1), call(4));
  });
}

// Ranking compares bits: flushing changes no choice.
TEST(flushing_changes_no_ranking) {
  repeat(500, [](Random& random) {
    const OpCall call = call_topk(random);
    const unsigned int state = _mm_getcsr();
    _mm_setcsr(state | 0x8040u);
    const uint64_t flushed = call(2);
    _mm_setcsr(state);
    CHECK_EQ(flushed, call(2));
  });
}
#endif

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
