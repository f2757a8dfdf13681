// How the CUDA kernels share out rows: every row and column once, in order where it matters.
#include <map>
#include <tuple>

#include "check.h"
#include "data.h"
#include "walk.h"

namespace cacovid::test {
namespace {

using namespace cuda;

TEST(divisors_divide) {
  const auto check = [](int64_t by, int64_t n) {
    if (n < 0 || n > most_rows) return;
    const Divisor d = divisor(by);
    const uint32_t quotient = d.quotient(static_cast<uint32_t>(n));
    CHECK_EQ(quotient, n / by);
    CHECK_EQ(d.remainder(static_cast<uint32_t>(n), quotient), n % by);
  };
  for (int64_t by = 1; by <= 300; ++by) {
    for (int64_t n = 0; n < 3000; ++n) check(by, n);
  }
  repeat(300000, [&](Random& random) {
    const int bits = static_cast<int>(random.range(0, 30));
    const int64_t by = std::min<int64_t>(random.range(1, int64_t{2} << bits), most_rows);
    const int64_t multiple = random.range(0, most_rows / by) * by;
    for (const int64_t n : {multiple - 1, multiple, multiple + 1, random.range(0, most_rows), most_rows}) check(by, n);
  });
}

// All blocks of tensors of one work: what they move, each as (tensor, row, half or rest, column).
void check_cover(const Work& work, int64_t tensors, int more_threads) {
  const uint32_t lanes_log2 = lanes_log2_of(work, tensors);
  CHECK(lanes_log2 <= 5);
  const int threads = std::min(threads_of(work, lanes_log2) * more_threads, most_threads);
  CHECK(threads % 32 == 0);
  Walks w = walks_of(work, lanes_log2, threads);
  w.first_block = 7;
  w.first_tensor = 3;
  const int64_t lanes = int64_t{1} << lanes_log2;
  std::map<std::tuple<uint32_t, uint32_t, bool, int64_t>, int> seen;
  for (uint32_t block = 0; block < tensors * w.walks.by * w.pieces.by; ++block) {
    const Walk walk = walk_of(w, block + 7);
    CHECK(walk.tensor >= 3 && walk.tensor < 3 + tensors);
    CHECK(walk.number < w.walks.by);
    CHECK_EQ(walk.column % lanes, 0);
    if (work.walks > 0) {
      CHECK_EQ(walk.first, walk.number * work.ordered);
      CHECK_EQ(int64_t{walk.last} - walk.first, work.ordered);
    } else {
      CHECK(int64_t{walk.last} - walk.first <= (threads >> lanes_log2) * accesses);
    }
    for (uint32_t row = walk.first; row < walk.last; ++row) {
      for (int64_t c = walk.column; c < std::min(walk.column + lanes, walk.pairs ? work.half : work.rest); ++c) {
        ++seen[{walk.tensor, row, walk.pairs, c}];
      }
    }
  }
  CHECK_EQ(static_cast<int64_t>(seen.size()), tensors * work.rows * (work.half + work.rest));
  bool once = true;
  for (const auto& [place, count] : seen) once = once && count == 1;
  CHECK(once);
}

TEST(walks_cover_every_row_once) {
  repeat(1500, [](Random& random) {
    Work work = {};
    work.width = random.pick({1, 2, 4, 8, 16});
    work.half = random.chance(50) ? 0 : random.size(1, 70);
    work.rest = random.size(work.half > 0 ? 0 : 1, 70);
    work.walks = random.chance(50) ? random.size(1, 8) : 0;
    work.ordered = work.walks > 0 ? random.size(0, 60) : 0;
    work.rows = work.walks > 0 ? work.walks * work.ordered : random.size(1, 200);
    check_cover(work, random.size(1, 6), static_cast<int>(random.pick({1, 1, 2, 8})));
  });
}

// A model of a walk in order: all loads of a step, in any order, then all its stores, for every list of some rows.
TEST(steps_never_overtake_their_sources) {
  for (int n = 1; n <= 10; ++n) {
    for (int list = 1; list < 1 << n; ++list) {
      std::vector<int> kept;
      for (int i = 0; i < n; ++i) {
        if (list >> i & 1) kept.push_back(i);
      }
      for (size_t rows = 1; rows <= kept.size(); ++rows) {
        std::vector<int> memory(static_cast<size_t>(n));
        for (int i = 0; i < n; ++i) memory[i] = i;
        for (size_t first = 0; first < kept.size(); first += rows) {
          const size_t last = std::min(first + rows, kept.size());
          std::vector<int> loaded;
          for (size_t r = first; r < last; ++r) loaded.push_back(memory[kept[r]]);
          std::copy(loaded.begin(), loaded.end(), memory.begin() + static_cast<int64_t>(first));
        }
        CHECK(std::equal(kept.begin(), kept.end(), memory.begin()));
      }
    }
  }
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
