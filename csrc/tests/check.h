// A test harness of one screen. TEST(name) { CHECK(...); CHECK_EQ(a, b); }, then TEST_MAIN once a file.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

#include "cacovid/ops.h"

namespace cacovid::test {

// What a sanitizer's slowness leaves of a number of repetitions.
#if defined(__SANITIZE_THREAD__)
constexpr int64_t slowdown = 6;
#elif defined(__SANITIZE_ADDRESS__)
constexpr int64_t slowdown = 2;
#else
constexpr int64_t slowdown = 1;
#endif

struct Tally {
  std::atomic<int64_t> checks{0}, failures{0};
};
inline Tally& tally() {
  static Tally t;
  return t;
}

// The random case under way, named in failures so that it can be run alone.
inline thread_local uint64_t current_seed = 0;

inline void record(bool holds, const char* file, int line, const char* text, const std::string& values) {
  tally().checks.fetch_add(1, std::memory_order_relaxed);
  if (holds) return;
  if (tally().failures.fetch_add(1) < 20) {
    std::fprintf(stderr, "%s:%d: %s%s (seed %llu)\n", file, line, text, values.c_str(),
                 static_cast<unsigned long long>(current_seed));
  }
}

template <class A, class B>
void record_equal(const A& a, const B& b, const char* file, int line, const char* text) {
  std::ostringstream values;
  if (!(a == b)) values << ": " << +a << " != " << +b;
  record(a == b, file, line, text, values.str());
}

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

// Arguments name the tests to run; none means all.
inline int run_tests(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash leaves the finished tests on record
  for (const Test& t : tests()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], t.name) == 0;
    if (!wanted) continue;
    const int64_t failures = tally().failures;
    try {
      t.body();
    } catch (const std::exception& e) {
      record(false, t.name, 0, "threw ", e.what());
    }
    std::printf("%-44s %s\n", t.name, tally().failures == failures ? "ok" : "FAILED");
  }
  std::printf("%lld checks, %lld failures, %s\n", static_cast<long long>(tally().checks.load()),
              static_cast<long long>(tally().failures.load()), cpu::isa_name());
  return tally().failures == 0 && tally().checks > 0 ? 0 : 1;
}

}  // namespace cacovid::test

#define CHECK(condition) ::cacovid::test::record(static_cast<bool>(condition), __FILE__, __LINE__, #condition, "")
#define CHECK_EQ(a, b) ::cacovid::test::record_equal(a, b, __FILE__, __LINE__, #a " == " #b)
#define TEST(name)                                                                             \
  static void name();                                                                          \
  static const bool name##_listed = (::cacovid::test::tests().push_back({#name, name}), true); \
  static void name()
#define TEST_MAIN \
  int main(int argc, char** argv) { return ::cacovid::test::run_tests(argc, argv); }
