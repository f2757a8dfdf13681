#include <algorithm>
#include <iterator>
#include <vector>

#include "cacovid/ops.h"
#include "cacovid/token_rows.h"
#include "isa/row_loops.h"
#include "memory.h"
#include "row_tasks.h"

namespace cacovid::cpu {
namespace {

// Positions of the index by the token they name, in ascending order: those of token n are
// order[starts[n] .. starts[n + 1]).
struct Inverse {
  std::vector<int64_t> starts, order;

  Inverse(const int64_t* index, int64_t count, int64_t tokens) : starts(tokens + 1), order(count) {
    const uint64_t limit = static_cast<uint64_t>(tokens);
    for (int64_t i = 0; i < count; ++i) {
      if (static_cast<uint64_t>(index[i]) < limit) ++starts[index[i] + 1];
    }
    for (int64_t n = 0; n < tokens; ++n) starts[n + 1] += starts[n];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i) {
      if (static_cast<uint64_t>(index[i]) < limit) order[next[index[i]]++] = i;
    }
  }
};

}  // namespace

void gather_rows(const Tensor* xs, const int32_t* dims, int64_t count, const int64_t* index, int64_t kept, bool fresh,
                 int threads, void* const* targets) {
  std::vector<TokenRows> tokens;
  std::vector<RowTasks> tasks;
  tokens.reserve(count);
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) {
    tokens.emplace_back(xs[t], dims[t], targets[t], kept);
    const TokenRows& x = tokens.back();
    tasks.push_back({x.bytes > 0 ? x.segments * kept : 0, rows_worth_a_thread(x.bytes)});
    total += tasks.back().rows * x.bytes;
    if (fresh) expect_writes(targets[t], tasks.back().rows * x.bytes);
  }
  const bool stream = worth_streaming(total);
  const RowLoops& loops = row_loops();
  for_rows(tasks, threads, [&](size_t t, int64_t first, int64_t last) {
    const TokenRows& x = tokens[t];
    while (first < last) {
      const int64_t from = first % kept, n = std::min(kept - from, last - first);
      const TokenRows::Offsets at = x.segment(first / kept);
      loops.copy_rows({x.target + at.target + from * x.target_step, x.source + at.source, x.target_step, x.source_step,
                       x.bytes, x.tokens, stream},
                      index + from, n);
      first += n;
    }
  });
}

void scatter_rows(const Tensor* grads, const RowSum* sums, int64_t count, const int64_t* index, int64_t kept,
                  bool fresh, int threads, void* const* targets) {
  int64_t most = 0;
  std::vector<RowTasks> tasks;
  std::vector<int64_t> bytes;
  int64_t written = 0;
  for (int64_t t = 0; t < count; ++t) {
    const RowSum& s = sums[t];
    most = std::max(most, s.tokens);
    bytes.push_back(s.columns * item_size(grads[t].dtype));
    tasks.push_back({bytes.back() > 0 ? s.outer * s.tokens : 0, rows_worth_a_thread(bytes.back())});
    if (fresh) expect_writes(targets[t], tasks.back().rows * bytes.back());
    written += tasks.back().rows * bytes.back();
  }
  const bool stream = worth_streaming(written);
  const Inverse inverse(index, kept, most);
  int64_t nothing[64];
  std::fill(std::begin(nothing), std::end(nothing), -1);
  const RowLoops& loops = row_loops();
  for_rows(tasks, threads, [&](size_t t, int64_t first, int64_t last) {
    const RowSum& s = sums[t];
    char* target = static_cast<char*>(targets[t]);
    const char* grad = static_cast<const char*>(grads[t].data);
    const auto terms = [&](int64_t row) { return inverse.starts[row % s.tokens + 1] - inverse.starts[row % s.tokens]; };
    for (int64_t r = first, run; r < last; r += run) {
      for (run = 0; run < 64 && r + run < last && terms(r + run) == 0;) ++run;
      if (run > 0) {  // most tokens were not kept: their sums are empty
        loops.copy_rows({target + r * bytes[t], nullptr, bytes[t], 0, bytes[t], 0, stream}, nothing, run);
        continue;
      }
      run = 1;
      loops.sum_rows(grad + r / s.tokens * kept * bytes[t], grads[t].dtype, s.columns,
                     inverse.order.data() + inverse.starts[r % s.tokens], terms(r), target + r * bytes[t]);
    }
  });
}

}  // namespace cacovid::cpu
