#include <algorithm>
#include <vector>

#include "cacovid/ops.h"
#include "isa/attention_loops.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

namespace cacovid::cpu {
namespace {

constexpr int64_t block_rows = 16;                // their products with 6,272 keys: 400 KB, which an L2 cache holds
constexpr int64_t operations_per_task = 1 << 18;  // about 10 us

// A row that sees keys [first, end) of its sequence, as far as they are not masked.
struct LiveRow {
  int64_t row, end;
};

// What the rows of one batch member see. Keys before the first visible one are left out and rows that see nothing too:
// neither may move the others to different lanes, so that padding changes no bit.
struct Sequence {
  int64_t first = 0;           // visible key; the number of keys if there is none
  std::vector<uint32_t> seen;  // of keys from `first` on; empty: all
  std::vector<LiveRow> rows;
  int64_t blocks = 0, first_block = 0;  // of rows of one key head; of all sequences before it
};

bool is_visible(const Tensor& mask, int64_t b, int64_t key) {
  return static_cast<const uint8_t*>(mask.data)[b * mask.strides[0] + key * mask.strides[1]] != 0;
}

Sequence sequence_of(const Tensor& query, const Tensor& keys, const Tensor& mask, const Tensor& positions, int64_t b) {
  Sequence s;
  const int64_t n = keys.sizes[2], group = query.sizes[1] / keys.sizes[1];
  if (mask.defined()) {
    while (s.first < n && !is_visible(mask, b, s.first)) ++s.first;
    bool all = true;
    for (int64_t j = s.first; j < n; ++j) all = all && is_visible(mask, b, j);
    if (!all) {
      s.seen.resize(static_cast<size_t>(n - s.first));
      for (int64_t j = s.first; j < n; ++j)
        s.seen[static_cast<size_t>(j - s.first)] = is_visible(mask, b, j) ? ~0u : 0u;
    }
  }
  for (int64_t r = 0; r < query.sizes[2]; ++r) {
    int64_t end = n;
    if (positions.defined()) {
      const int64_t last = positions.as<int64_t>()[b * positions.strides[0] + r * positions.strides[1]];
      end = last >= n - 1 ? n : last + 1;
    }
    if (end > s.first) s.rows.push_back({r, end});
  }
  s.blocks = (static_cast<int64_t>(s.rows.size()) * group + block_rows - 1) / block_rows;
  return s;
}

void load_query(const Tensor& query, int64_t b, int64_t head, int64_t row, int64_t columns, float* out) {
  const Row from = {offset(query, b * query.strides[0] + head * query.strides[1] + row * query.strides[2]),
                    query.strides[3]};
  for (int64_t c = 0; c < columns; ++c) out[c] = c < query.sizes[3] ? load_element(from, query.dtype, c) : 0.0f;
}

// The weights of one block of rows of a key head, added up: totals [L - s.first].
void add_block(const Tensor& query, const Tensor& keys, const Sequence& s, int64_t b, int64_t head, int64_t block,
               float scale, float* totals) {
  const int64_t n = keys.sizes[2] - s.first, group = query.sizes[1] / keys.sizes[1];
  const int64_t live = static_cast<int64_t>(s.rows.size()), columns = chunks(keys.sizes[3]) * chunk;
  const int64_t begin = block * block_rows, rows = std::min(block_rows, live * group - begin), step = chunks(n) * chunk;
  float* queries = scratch<struct query_scratch, float>((block_rows + 4) * columns);
  float* products = scratch<struct product_scratch, float>(block_rows * step);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t m = begin + r;
    load_query(query, b, head * group + m / live, s.rows[static_cast<size_t>(m % live)].row, columns,
               queries + r * columns);
  }
  const int64_t at = b * keys.strides[0] + head * keys.strides[1] + s.first * keys.strides[2];
  const KeyRows of = {offset(keys, at), keys.dtype, n, keys.sizes[3], keys.strides[2], keys.strides[3]};
  attention_loops().products(of, queries, rows, products, step, queries + block_rows * columns);
  std::fill(totals, totals + n, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t seen = s.rows[static_cast<size_t>((begin + r) % live)].end - s.first;
    attention_loops().add_softmax(products + r * step, s.seen.empty() ? nullptr : s.seen.data(), seen, scale, totals);
  }
}

}  // namespace

void attention_scores(Tensor query, Tensor keys, Tensor mask, Tensor row_positions, AttentionRule rule, int threads,
                      float* scores) {
  const int64_t batch = keys.sizes[0], heads = keys.sizes[1], n = keys.sizes[2];
  const int64_t group = query.sizes[1] / heads;
  std::vector<Sequence> sequences;
  std::vector<int64_t> ends;  // of the tasks of each sequence
  int64_t tasks = 0;
  for (int64_t b = 0; b < batch; ++b) {
    sequences.push_back(sequence_of(query, keys, mask, row_positions, b));
    sequences.back().first_block = tasks;
    ends.push_back(tasks += heads * sequences.back().blocks);
  }
  // A block of rows is one thread's, and blocks are added in order: one order of additions.
  float* totals = scratch<struct total_scratch, float>(tasks * n);
  const Sequence* all = sequences.data();
  const int64_t rows_per_task = std::min(block_rows, group * query.sizes[2]);
  const int64_t grain = operations_per_task / std::max<int64_t>(n * keys.sizes[3] * rows_per_task, 1) + 1;
  parallel_for(tasks, grain, threads, [=, &ends](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
      const Sequence& s = all[b];
      const int64_t head = (task - s.first_block) / s.blocks, block = (task - s.first_block) % s.blocks;
      add_block(query, keys, s, b, head, block, rule.scale, totals + task * n);
    }
  });
  const int64_t out_heads = rule.per_head ? heads : 1;
  for (int64_t out = 0; out < batch * out_heads; ++out) {
    const Sequence& s = all[out / out_heads];
    const int64_t blocks = s.blocks * (heads / out_heads), first = s.first_block + out % out_heads * s.blocks;
    const float rows = static_cast<float>(static_cast<int64_t>(s.rows.size()) * group * (heads / out_heads));
    float* to = scores + out * n;
    std::fill(to, to + n, 0.0f);
    if (blocks == 0) continue;
    for (int64_t i = 0; i < blocks; ++i) {
      const float* from = totals + (first + i) * n;
      for (int64_t j = 0; j < n - s.first; ++j) to[s.first + j] += from[j];
    }
    for (int64_t j = 0; j < n - s.first; ++j) {
      const bool seen = s.seen.empty() || s.seen[static_cast<size_t>(j)] != 0;
      to[s.first + j] = seen ? to[s.first + j] / rows : 0.0f;
    }
  }
}

}  // namespace cacovid::cpu
