#include <sys/wait.h>

#include <set>
#include <stdexcept>
#include <thread>

#include "data.h"
#include "thread_pool.h"

namespace cacovid::test {
namespace {

using cpu::parallel_for;

// How often each index is visited.
std::vector<int> visits(int64_t count, int64_t grain, int threads) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
  parallel_for(count, grain, threads, [&](int64_t first, int64_t last) {
    CHECK(0 <= first && first < last && last <= count);
    CHECK(last - first >= std::min(grain, count) || last == count);
    for (int64_t i = first; i < last; ++i) seen[i].fetch_add(1);
  });
  return {seen.begin(), seen.end()};
}

TEST(covers_every_index_once) {
  repeat(800, [](Random& random) {
    const int64_t count = random.size(0, 3000), grain = random.size(-1, 400);
    const int threads = static_cast<int>(random.pick<int64_t>({-3, 0, 1, 2, 3, 5, 8}));
    for (const int n : visits(count, grain, threads)) CHECK_EQ(n, 1);
  });
}

TEST(takes_any_number_of_threads) {
  for (const int threads : {255, 256, 257, 1 << 30}) {
    for (const int n : visits(600, 1, threads)) CHECK_EQ(n, 1);
  }
}

TEST(runs_nested_calls_alone) {
  std::atomic<int64_t> sum{0};
  parallel_for(64, 1, 3, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const std::thread::id outer = std::this_thread::get_id();
      parallel_for(10, 1, 3, [&](int64_t from, int64_t to) {
        CHECK(std::this_thread::get_id() == outer);
        sum += to - from;
      });
    }
  });
  CHECK_EQ(sum.load(), 640);
}

TEST(serves_many_callers) {
  std::vector<std::thread> callers;
  for (int t = 0; t < 6; ++t) {
    callers.emplace_back([t] {
      for (int i = 0; i < 100; ++i) {
        for (const int n : visits(100 + t, 3, 4)) CHECK_EQ(n, 1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// An exception of any thread reaches the caller, and the pool serves on.
TEST(hands_exceptions_to_the_caller) {
  repeat(200, [](Random& random) {
    const int64_t bad = random.range(0, 99);
    const int threads = static_cast<int>(random.range(1, 6));
    const bool all = random.chance(20);
    bool caught = false;
    try {
      parallel_for(100, 1, threads, [&](int64_t first, int64_t last) {
        if (all || (first <= bad && bad < last)) throw std::runtime_error("planted");
      });
    } catch (const std::runtime_error& e) {
      caught = std::string(e.what()) == "planted";
    }
    CHECK(caught);
    for (const int n : visits(100, 1, threads)) CHECK_EQ(n, 1);
  });
}

#if !defined(__SANITIZE_THREAD__)  // its runtime does not follow a threaded process into a child
TEST(works_in_a_forked_child) {
  visits(1000, 1, 4);
  for (int i = 0; i < 10; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      bool right = true;
      for (const int n : visits(1000, 1, 4)) right &= n == 1;
      _exit(right ? 0 : 1);
    }
    int status = -1;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    for (const int n : visits(1000, 1, 4)) CHECK_EQ(n, 1);
  }
}

// The child must not wait for a lock that another thread held when it was made.
TEST(forks_while_others_work) {
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) visits(2000, 1, 3);
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      std::atomic<int64_t> sum{0};
      parallel_for(1000, 1, 4, [&](int64_t first, int64_t last) { sum += last - first; });
      _exit(sum == 1000 ? 0 : 1);
    }
    int status = -1;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
  }
  stop = true;
  other.join();
}
#endif

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
