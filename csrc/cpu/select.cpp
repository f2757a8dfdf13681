#include <algorithm>
#include <vector>

#include "cacovid/ops.h"
#include "cacovid/order.h"
#include "isa/hot_loops.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

namespace cacovid::cpu {
namespace {

struct key_scratch;
struct position_scratch;
struct word_scratch;

constexpr int64_t frames_per_task = 32;  // about 5 us of work: less does not pay for waking a thread

// Where a frame's tokens lie, what it keeps, and where the results go. Every field follows from the
// counts alone, so frames are independent of each other.
struct FrameTask {
  int64_t row;         // frame number over all videos
  int64_t token;       // flat position of its first token
  int64_t ranked;      // tokens kept by score
  int64_t unranked;    // tokens of earlier frames of the video that were not kept by score
  int64_t first_pick;  // uniform picks of earlier frames
  int64_t picks;
  int64_t out;         // kept tokens before this frame
  const BudgetPlan* plan;
};

int64_t fill_count(const BudgetPlan& p) { return p.num_keep - p.num_ranked; }
int64_t unranked_count(const BudgetPlan& p) { return p.frames * p.tokens_per_frame - p.num_ranked; }

int64_t rank_of(const BudgetPlan& p, int64_t pick) {
  return fill_rank(pick, fill_count(p), unranked_count(p), p.float_ranks);
}

// Number of uniform picks with a rank below `bound`: a guess by proportion, then a step or two.
int64_t picks_below(const BudgetPlan& p, int64_t bound) {
  const int64_t count = fill_count(p), unranked = unranked_count(p);
  if (count == 0 || bound <= 0) return 0;
  if (bound >= unranked) return count;
  const double spacing = static_cast<double>(unranked - 1) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  int64_t j = std::min(count, static_cast<int64_t>(static_cast<double>(bound) / spacing));
  while (j < count && rank_of(p, j) < bound) ++j;
  while (j > 0 && rank_of(p, j - 1) >= bound) --j;
  return j;
}

void list_frames(Videos videos, const int64_t* counts, std::vector<FrameTask>& tasks) {
  int64_t row = 0, token = 0, out = 0;
  for (int64_t v = 0; v < videos.count; ++v) {
    const BudgetPlan& p = videos.plans[v];
    int64_t unranked = 0, pick = 0;
    for (int64_t f = 0; f < p.frames; ++f, ++row, token += p.tokens_per_frame) {
      const int64_t next = unranked + p.tokens_per_frame - counts[row];
      const int64_t last_pick = picks_below(p, next);
      tasks.push_back({row, token, counts[row], unranked, pick, last_pick - pick, out, &p});
      out += counts[row] + last_pick - pick;
      unranked = next;
      pick = last_pick;
    }
  }
}

// Merges the ascending ranked positions with the picks among the others: the r-th unranked position is
// r plus the ranked ones at or before it, so no mask over the frame is needed.
void emit_frame(const FrameTask& task, const int32_t* ranked, int64_t* out) {
  int64_t taken = 0;
  for (int64_t j = 0; j < task.picks; ++j) {
    const int64_t r = rank_of(*task.plan, task.first_pick + j) - task.unranked;
    for (; taken < task.ranked && ranked[taken] - taken <= r; ++taken) *out++ = task.token + ranked[taken];
    *out++ = task.token + r + taken;
  }
  for (; taken < task.ranked; ++taken) *out++ = task.token + ranked[taken];
}

// Reorders flat positions by falling score, the lower position first among equals.
void sort_by_score(const Tensor& scores, int64_t row, int64_t start, int64_t row_length, int64_t* positions,
                   int64_t count) {
  uint64_t* words = scratch<word_scratch, uint64_t>(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t in_segment = positions[i] - start;
    const int64_t frame = in_segment / row_length, column = in_segment % row_length;
    const Row r = row_of(scores, row + frame, start + frame * row_length);
    uint32_t key[key_block];
    const char* element = static_cast<const char*>(r.data) + column * r.stride * item_size(scores.dtype);
    hot_loops().load_keys(element, scores.dtype, 1, 1, key);
    words[i] = rank_word(key[0], static_cast<uint32_t>(in_segment));
  }
  std::sort(words, words + count, [](uint64_t a, uint64_t b) { return a > b; });
  for (int64_t i = 0; i < count; ++i) positions[i] = start + rank_index(words[i]);
}

}  // namespace

void select_tokens(Tensor token_scores, Tensor frame_scores, Videos videos, bool by_score, int threads,
                   int64_t* indices, int64_t* frame_counts, int32_t* status) {
  allocate_budget(frame_scores, videos, frame_counts, status);
  thread_local std::vector<FrameTask> tasks;
  tasks.clear();
  list_frames(videos, frame_counts, tasks);
  const FrameTask* all = tasks.data();
  const int64_t rows = static_cast<int64_t>(tasks.size());
  int32_t* flags = scratch<struct flag_scratch, int32_t>(rows);
  parallel_for(rows, frames_per_task, threads, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const FrameTask& task = all[i];
      const int64_t n = task.plan->tokens_per_frame;
      const Row row = row_of(token_scores, task.row, task.token);
      uint32_t* keys = scratch<key_scratch, uint32_t>(padded(n));
      int32_t* ranked = scratch<position_scratch, int32_t>(n);
      flags[i] = hot_loops().load_keys(row.data, token_scores.dtype, row.stride, n, keys);
      hot_loops().top_positions(keys, n, task.ranked, ranked);
      emit_frame(task, ranked, indices + task.out);
    }
  });
  int64_t row = 0, token = 0, out = 0;
  for (int64_t v = 0; v < videos.count; ++v) {
    const BudgetPlan& p = videos.plans[v];
    if (by_score) sort_by_score(token_scores, row, token, p.tokens_per_frame, indices + out, p.num_keep);
    for (int64_t f = 0; f < p.frames; ++f, ++row) {
      frame_counts[row] += all[row].picks;
      status[v] |= flags[row];
    }
    token += p.frames * p.tokens_per_frame;
    out += p.num_keep;
  }
}

void segmented_topk(Tensor scores, const int64_t* offsets, const int64_t* k, int64_t segments, bool by_score,
                    int threads, int64_t* indices, int32_t* status) {
  int64_t* outs = scratch<struct out_scratch, int64_t>(segments + 1);
  outs[0] = 0;
  for (int64_t s = 0; s < segments; ++s) outs[s + 1] = outs[s] + k[s];
  parallel_for(segments, frames_per_task, threads, [=](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t n = offsets[s + 1] - offsets[s];
      const Row row = row_of(scores, s, offsets[s]);
      uint32_t* keys = scratch<key_scratch, uint32_t>(padded(n));
      int32_t* top = scratch<position_scratch, int32_t>(n);
      status[s] = hot_loops().load_keys(row.data, scores.dtype, row.stride, n, keys);
      hot_loops().top_positions(keys, n, k[s], top);
      int64_t* out = indices + outs[s];
      for (int64_t i = 0; i < k[s]; ++i) out[i] = offsets[s] + top[i];
      if (by_score) sort_by_score(scores, s, offsets[s], n, out, k[s]);
    }
  });
}

}  // namespace cacovid::cpu
