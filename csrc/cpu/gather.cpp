#include <algorithm>
#include <iterator>
#include <vector>

#include "cacovid/ops.h"
#include "isa/row_loops.h"
#include "memory.h"
#include "row_tasks.h"

namespace cacovid::cpu {
namespace {

// One tensor seen as tokens. A token's elements are one contiguous row if memory allows it, else several; the
// axes that number a token's rows, and those outside the token axis, are merged where strides allow it.
struct Tokens {
  struct Axis {
    int64_t size, source_stride, target_stride;  // bytes
  };
  Axis axes[max_dims];
  int32_t count = 0;
  RowCopy rows;
  int64_t segments = 1;  // product of the axes: each is one call of copy_rows over the whole index

  void add(int64_t size, int64_t source_stride, int64_t target_stride) {
    segments *= size;
    if (size == 1) return;
    if (count > 0) {
      Axis& outer = axes[count - 1];
      if (outer.source_stride == size * source_stride && outer.target_stride == size * target_stride) {
        outer = {outer.size * size, source_stride, target_stride};
        return;
      }
    }
    axes[count++] = {size, source_stride, target_stride};
  }

  Tokens(const Tensor& x, int32_t dim, void* target, int64_t kept) {
    int64_t row = item_size(x.dtype);
    const int64_t item = row;
    int64_t target_strides[max_dims], stride = item;
    for (int32_t d = x.ndim - 1; d >= 0; --d) {
      target_strides[d] = stride;
      stride *= d == dim ? kept : x.sizes[d];
    }
    int32_t last = x.ndim;  // the axes from here on lie in memory as in the target
    while (last > dim + 1 && (x.sizes[last - 1] == 1 || x.strides[last - 1] * item == row)) row *= x.sizes[--last];
    for (int32_t d = 0; d < last; ++d) {
      if (d != dim) add(x.sizes[d], x.strides[d] * item, target_strides[d]);
    }
    rows = {static_cast<char*>(target),
            static_cast<const char*>(x.data),
            target_strides[dim],
            x.strides[dim] * item,
            row,
            x.sizes[dim],
            false};
  }

  RowCopy segment(int64_t number) const {
    RowCopy result = rows;
    for (int32_t a = count - 1; a >= 0; --a) {
      const int64_t at = number % axes[a].size;
      number /= axes[a].size;
      result.source += at * axes[a].source_stride;
      result.target += at * axes[a].target_stride;
    }
    return result;
  }
};

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
  std::vector<Tokens> tokens;
  std::vector<RowTasks> tasks;
  tokens.reserve(count);
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) {
    tokens.emplace_back(xs[t], dims[t], targets[t], kept);
    const Tokens& x = tokens.back();
    tasks.push_back({x.rows.bytes > 0 ? x.segments * kept : 0, rows_worth_a_thread(x.rows.bytes)});
    total += tasks.back().rows * x.rows.bytes;
    if (fresh) expect_writes(targets[t], tasks.back().rows * x.rows.bytes);
  }
  const bool stream = worth_streaming(total);
  for (Tokens& x : tokens) x.rows.stream = stream;
  const RowLoops& loops = row_loops();
  for_rows(tasks, threads, [&](size_t t, int64_t first, int64_t last) {
    while (first < last) {
      const int64_t segment = first / kept, from = first % kept;
      const int64_t n = std::min(kept - from, last - first);
      RowCopy copy = tokens[t].segment(segment);
      copy.target += from * copy.target_step;
      loops.copy_rows(copy, index + from, n);
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
